"""Generation, padding, input embeddings, packed rows, half precision, autocast, quantised linears, compilation."""

import dataclasses
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_kit import record_routing, routing_inputs
from moe_kit.hf.chunks import warn_chunks
from moe_kit.routing.state import require_routing_state
from tests.conformance.common import NAME, config, gradients, routed, wake
from tests.tiny import batch_of, tiny_llama
from tests.tolerances import assert_close

EVERYTHING = dict(target_modules="all-linear")


def prompts(rows=2, length=5):
    return {key: value for key, value in batch_of(rows=rows, length=length).items() if key != "labels"}


def context(model):
    return require_routing_state(model).context


class TestGenerate:
    @pytest.mark.parametrize("scope", ["token", "sequence", "request"])
    def test_greedy_equals_passes_without_a_cache(self, scope):
        model = routed(scope=scope, **EVERYTHING)
        out = model.generate(**prompts(), max_new_tokens=5, do_sample=False)
        ids = prompts()["input_ids"]
        for _ in range(5):
            # the decisions of a sequence are those of its prompt
            with routing_inputs(model, prompt_length=5):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(out, ids)

    def test_positional_arguments(self):
        model, batch = routed(), prompts()
        expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False), expected)

    @pytest.mark.parametrize("scope", ["token", "sequence", "request"])
    def test_beams(self, scope):
        """Each row with its beams alone gives what it gives in the batch."""
        model, batch = routed(scope=scope), prompts(rows=3)
        options = dict(max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
        together = model.generate(**batch, **options)
        for row in range(3):
            alone = model.generate(**{key: value[row : row + 1] for key, value in batch.items()}, **options)
            assert torch.equal(together[2 * row : 2 * row + 2], alone)

    @pytest.mark.parametrize("scope", ["sequence", "request"])
    def test_a_sequence_decides_once(self, scope):
        """Decisions made on the prompt hold while decoding, through beams as well."""
        model, batch = routed(scope=scope), prompts(rows=2)
        seen = []
        handle = model.get_base_model().register_forward_hook(
            lambda *_: seen.append({site: r.dense_NE() for site, r, _ in context(model).registered})
        )
        for options in ({}, {"num_beams": 2}):
            seen.clear()
            model.generate(**batch, max_new_tokens=4, do_sample=False, **options)
            assert len(seen) >= 3
            for site, first in seen[0].items():
                assert not torch.equal(first[0], first[-1])
                for later in seen[1:]:
                    assert torch.equal(later[site], first), site
        handle.remove()

    @pytest.mark.parametrize("scope", ["sequence", "request"])
    def test_cache_of_a_plain_forward_keeps_the_decisions(self, scope):
        model, batch = routed(scope=scope), prompts(rows=2)
        out = model(**batch, use_cache=True)
        first = {site: r.dense_NE() for site, r, _ in context(model).registered}
        model(input_ids=batch["input_ids"][:, :1], past_key_values=out.past_key_values, use_cache=True)
        for site, routing, _ in context(model).registered:
            assert torch.equal(routing.dense_NE(), first[site])

    @pytest.mark.parametrize("scope", ["sequence", "request"])
    def test_a_prompt_in_chunks_is_decided_on_the_first(self, scope):
        """And the user is told, once."""
        model, batch = routed(scope=scope), prompts(rows=2)
        options = dict(max_new_tokens=3, do_sample=False)
        first = {}

        def keep(*_):
            for site, routing, _ in context(model).registered:
                first.setdefault(site, routing.dense_NE())

        warn_chunks.cache_clear()
        handle = model.get_base_model().register_forward_hook(keep)
        with pytest.warns(UserWarning, match="first 3 tokens of the prompt"):
            model.generate(**batch, **options, prefill_chunk_size=3)
        handle.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.generate(**batch, **options, prefill_chunk_size=3)
        for site, routing, _ in context(model).registered:
            assert torch.equal(routing.dense_NE(), first[site])
        model(input_ids=batch["input_ids"][:, :3])
        for site, routing, _ in context(model).registered:
            assert_close(site, routing.dense_NE(), first[site])

    @pytest.mark.parametrize(
        ("scope", "options"),
        [("token", {"prefill_chunk_size": 3}), ("sequence", {}), ("sequence", {"prefill_chunk_size": 5})],
    )
    def test_nothing_is_said_of_chunks_where_they_do_not_matter(self, scope, options):
        warn_chunks.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            routed(scope=scope).generate(**prompts(rows=2), max_new_tokens=3, do_sample=False, **options)

    @pytest.mark.parametrize("scope", ["token", "sequence", "request"])
    def test_left_padding(self, scope):
        model = routed(scope=scope, **EVERYTHING)
        short, long = torch.tensor([[7, 9, 11]]), torch.tensor([[5, 4, 3, 2, 1]])
        padded = torch.cat([nn.functional.pad(short, (2, 0)), long])
        mask = (padded != 0).long()
        options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        together = model.generate(input_ids=padded, attention_mask=mask, **options)
        assert torch.equal(together[0, 5:], model.generate(input_ids=short, **options)[0, 3:])
        assert torch.equal(together[1, 5:], model.generate(input_ids=long, **options)[0, 5:])

    def test_right_padding_in_training(self):
        # in double precision: what padding does to the order of sums is not the question here
        model = routed(**EVERYTHING).double().train()
        batch = batch_of(rows=1, length=5)
        # with padding on the left a first token could be predicted
        batch["labels"][:, 0] = -100
        results = []
        for left, right in ((0, 0), (3, 0), (0, 3)):
            padded = {
                key: nn.functional.pad(value, (left, right), value=-100 if key == "labels" else 0)
                for key, value in batch.items()
            }
            padded["labels"][padded["attention_mask"] == 0] = -100
            model.zero_grad()
            positions = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
            loss = model(**padded, position_ids=positions).loss
            loss.backward()
            results.append((loss.detach(), gradients(model)))
        for loss, found in results[1:]:
            assert_close("loss", loss, results[0][0], torch.float32)
            for key, value in found.items():
                assert_close(key, value, results[0][1][key], torch.float32)

    def test_embeddings_instead_of_ids(self):
        model, batch = routed(scope="sequence"), prompts()
        embedded = model.get_input_embeddings()(batch["input_ids"])
        expected = model(**batch).logits
        found = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
        assert torch.equal(found, expected)

    def test_last_logits_only(self):
        """An adapted head sees fewer tokens than the pass has, also where rows are padded on the left."""
        model = routed(target_modules=["lm_head", "q_proj"])
        batch = prompts()
        batch["input_ids"][0, :2] = 0
        batch["attention_mask"][0, :2] = 0
        whole = model(**batch).logits
        last = model(**batch, logits_to_keep=2).logits
        torch.testing.assert_close(last, whole[:, -2:])


class TestPackedRows:
    """Documents that share a row, told by positions that start anew; as TRL's padding-free batches have them."""

    DOCUMENTS = ([3, 4, 5, 6], [7, 8, 9], [10, 11])

    def packed(self):
        ids = torch.tensor([[token for document in self.DOCUMENTS for token in document]])
        positions = torch.cat([torch.arange(len(document)) for document in self.DOCUMENTS])[None]
        return ids, positions

    @pytest.mark.parametrize("scope", ["token", "sequence"])
    def test_each_document_is_a_sequence(self, scope):
        model = routed(scope=scope, **EVERYTHING)
        ids, positions = self.packed()
        # transformers keeps documents apart in attention only without a cache
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        assert context(model).num_sequences == 3
        alone = torch.cat([model(input_ids=torch.tensor([document])).logits[0] for document in self.DOCUMENTS])
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)

    def test_a_request_is_a_row_whatever_is_packed_in_it(self):
        model = routed(scope="request")
        ids, positions = self.packed()
        model(input_ids=ids, position_ids=positions, use_cache=False)
        assert {routing.num_decisions for _, routing, _ in context(model).registered} == {1}

    def test_prompts_of_documents(self):
        model = routed(scope="sequence")
        ids, positions = self.packed()
        labels = ids.clone()
        labels[0, [0, 1, 4, 7, 8]] = -100
        model(input_ids=ids, position_ids=positions, labels=labels)
        prompt = context(model).prompt_mask_BS[0].tolist()
        # the last document has no label: all of it is prompt
        assert prompt == [True, True, False, False, True, False, False, True, True]

    def test_a_label_at_the_first_token_leaves_that_document_whole(self):
        model = routed(scope="sequence")
        ids, positions = self.packed()
        labels = ids.clone()
        labels[0, 4] = -100
        model(input_ids=ids, position_ids=positions, labels=labels)
        assert context(model).prompt_mask_BS[0].tolist() == [True] * 5 + [False] * 2 + [True] * 2

    def test_plain_positions_are_one_sequence_a_row(self):
        model, batch = routed(), prompts()
        model(input_ids=batch["input_ids"], position_ids=torch.arange(5)[None])
        assert context(model).sequence_BS is None
        model(**batch, position_ids=torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]))
        assert context(model).sequence_BS is None, "positions under a padding mask are not documents"


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_base(self, dtype):
        model = routed(tiny_llama().to(dtype).eval(), **EVERYTHING)
        kinds = {value.dtype for key, value in model.named_parameters() if "moe_adapter" in key}
        assert kinds == {torch.float32}, "PEFT's cast keeps adapters in float32"
        out = model(**batch_of())
        assert out.logits.dtype == dtype
        assert all(r.weights_NK.dtype == torch.float32 for _, r, _ in context(model).registered)
        full = routed(tiny_llama().eval(), **EVERYTHING)(**batch_of())
        # a few tokens choose other experts
        assert torch.nn.functional.cosine_similarity(out.logits.float(), full.logits, dim=-1).mean() > 0.98
        assert model.generate(**prompts(), max_new_tokens=3).shape == (2, 8)
        model.train()(**batch_of()).loss.backward()
        assert all(value.isfinite().all() for value in gradients(model).values())

    def test_whole_model_cast(self):
        model = routed(**EVERYTHING).to(torch.bfloat16)
        out = model(**batch_of())
        assert out.logits.dtype == torch.bfloat16
        routers = {value.dtype for key, value in model.named_parameters() if "moe_adapter_router" in key}
        assert routers == {torch.float32}

    @pytest.mark.parametrize("hooked", [False, True], ids=["fused", "plain"])
    def test_autocast(self, hooked):
        model = routed(**EVERYTHING)
        if hooked:
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.train()(**batch_of())
        assert out.logits.dtype == torch.bfloat16
        assert all(r.logits_NE.dtype == torch.float32 for _, r, _ in context(model).registered)
        out.loss.backward()
        expected = routed(**EVERYTHING).train()
        expected(**batch_of()).loss.backward()
        wanted = gradients(expected)
        for key, value in gradients(model).items():
            if "bank" in key:
                similarity = torch.nn.functional.cosine_similarity(value.flatten(), wanted[key].flatten(), dim=0)
                assert similarity > 0.9, key

    def test_quantised_linears(self):
        """A base linear that offers nothing but its call: dynamic int8."""
        base = tiny_llama(width=32).eval()
        for module in list(base.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear and name != "lm_head":
                    setattr(module, name, Int8Linear(child))
        model = get_peft_model(base, config(target_modules="all-linear"), adapter_name=NAME)
        plain = model.base_model.model
        assert len([key for key, _ in model.named_modules() if key.endswith("moe_adapter_bank")]) == 2 * 7
        fresh = model(**batch_of()).logits
        with model.disable_adapter():
            assert torch.allclose(fresh, plain(**batch_of()).logits, atol=1e-6)
        wake(model)
        model.train()(**batch_of()).loss.backward()
        found = gradients(model)
        assert {key.split(".")[-1] for key in found} >= {"A", "B"}
        assert model.eval().generate(**prompts(), max_new_tokens=2).shape == (2, 7)

    def test_quantised_weights_of_a_plain_linear(self):
        """A weight of its own tensor class inside `nn.Linear`, as torchao leaves it: it knows `linear` and nothing else."""
        base = tiny_llama(width=32).eval()
        for module in base.modules():
            if type(module) is nn.Linear and module is not base.lm_head:
                scale = module.weight.detach().abs().amax() / 127
                codes = (module.weight.detach() / scale).round().to(torch.int8)
                module.weight = nn.Parameter(Int8Weight(codes, scale), requires_grad=False)
        model = get_peft_model(base, config(target_modules="all-linear"), adapter_name=NAME)
        wake(model)
        model.train()(**batch_of()).loss.backward()
        assert {key.split(".")[-1] for key in gradients(model)} >= {"A", "B"}


class Int8Weight(torch.Tensor):
    """Int8 codes with a scale, which look like a float32 matrix."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *rest = args
            return nn.functional.linear(x, weight.codes.float() * weight.scale, *rest)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(str(function))


class Int8Linear(nn.Module):
    """Weights as int8 with a scale for each row; there is no float weight to look at."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scale.to(x.dtype)).T


class TestCompile:
    def test_whole_graph(self):
        model = routed(**EVERYTHING)
        expected = model(**batch_of()).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch_of()).logits, expected, rtol=1e-4, atol=1e-5)

    def test_whole_graph_in_training(self):
        model = routed(**EVERYTHING).train()
        loss = model(**batch_of()).loss
        loss.backward()
        expected = gradients(model)
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(**batch_of()).loss
        found.backward()
        torch.testing.assert_close(found, loss)
        for key, value in gradients(model).items():
            assert_close(key, value, expected[key])


def test_context_fields_are_all_reset_for_a_pooled_state():
    """The context of a pooled state must not keep a token-shaped field that is added later."""
    from moe_kit.routing import RoutingContext

    token_shaped = {field.name for field in dataclasses.fields(RoutingContext) if field.name.endswith("_BS")}
    assert token_shaped == {"mask_BS", "prompt_mask_BS", "sequence_BS", "shape_BS"}


def test_record_covers_every_router():
    model = routed(**EVERYTHING)
    with record_routing(model) as record:
        model(**batch_of())
    assert len(record) == 2 * 4, "q,k,v share; gate,up share"
