"""One batch whose rows use different adapters: each row is what it would be in a batch under its own adapter."""

from collections import OrderedDict
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from moe_kit import (
    LayerRoutingConfig,
    RoutedAdapterConfig,
    RoutingError,
    record_routing,
    routing_inputs,
    routing_metrics,
)
from tests.adapters.rule_cases import CASES, wake_routers
from tests.conformance.common import config, wake
from tests.tiny import batch_of, tiny_llama, tiny_moe, wake_banks
from tests.tolerances import assert_close

NAMES = ["a", "__base__", "b", "a", "b"]


def padded(rows=5, length=6, side="right"):
    """Rows of different lengths, on either side."""
    ids = batch_of(rows=rows, length=length)["input_ids"]
    mask = torch.ones_like(ids)
    for row in range(rows):
        cut = row % 3
        if cut:
            mask[row, -cut:] = 0
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def two(first, second, base=None):
    """A model with two adapters that are awake and differ."""
    model = get_peft_model(base or tiny_llama().eval(), first, adapter_name="a")
    model.add_adapter("b", second)
    wake_banks(model)
    model.set_adapter("a")
    return model.eval()


def alone(model, call, names):
    """What each row gives in a batch of its own kind; `call` gets the indices of the rows."""
    found = {}
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                result = call(rows)
        else:
            model.set_adapter(name)
            result = call(rows)
        per_row = len(result) // len(rows)
        found |= {row: result[i * per_row : (i + 1) * per_row] for i, row in enumerate(rows)}
    model.set_adapter("a")
    return [found[row] for row in range(len(names))]


@torch.no_grad()
def logits(model, batch, rows, task_ids=None, **names):
    given = nullcontext() if task_ids is None else routing_inputs(model, task_ids=task_ids[rows])
    with given:
        return model(**{key: value[rows] for key, value in batch.items()}, **names).logits


def forwarded(model, batch, active="a", **inputs):
    """Compare a mixed forward pass with rows under their own adapter, padding aside."""
    call = partial(logits, model, batch, **inputs)
    expected = torch.cat(alone(model, call, NAMES))
    model.set_adapter(active)
    found = call(list(range(len(NAMES))), adapter_names=NAMES)
    real = batch["attention_mask"].bool()
    assert_close("logits", found[real], expected[real])
    return found


def generated(model, names, batch, **settings):
    """Compare a mixed `generate` with rows under their own adapter."""
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}

    def call(rows):
        return model.generate(**{key: value[rows] for key, value in batch.items()}, **settings)

    expected = torch.cat(alone(model, call, names))
    found = model.generate(**batch, **settings, adapter_names=names)
    assert torch.equal(found, expected)
    return found


OTHER = dict(num_experts=3, top_k=1, r=2, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_of_every_method(case):
    model = two(case.config(), config(**OTHER))
    wake_routers(model)
    batch = padded()
    tasks = {"task_ids": torch.tensor([0, 1, 2, 2, 1])} if case.config().scope == "task" else {}
    found = forwarded(model, batch, **tasks)
    # and the adapters do differ on these rows
    assert not torch.allclose(found, logits(model, batch, list(range(len(NAMES))), **tasks), atol=1e-2)


def test_peft_s_lora_agrees_on_the_meaning():
    model = two(
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        LoraConfig(r=3, target_modules=["up_proj"], init_lora_weights=False),
    )
    forwarded(model, padded())


class TestGenerate:
    @pytest.mark.parametrize("scope", ["token", "sequence", "request"])
    @pytest.mark.parametrize(
        "settings",
        [{}, dict(num_beams=2), dict(num_beams=3, num_return_sequences=2), dict(use_cache=False)],
        ids=["greedy", "beams", "returned", "no cache"],
    )
    def test_tokens(self, scope, settings):
        if scope != "token" and "use_cache" in settings:
            pytest.skip("without a cache each step is a prompt of its own")
        model = two(config(scope=scope, target_modules="all-linear"), config(**OTHER))
        wake(model)
        generated(model, NAMES, padded(side="left"), **settings)

    def test_sampled_copies_of_a_row(self):
        model = two(config(), config(**OTHER))
        wake(model)
        batch = padded(side="left")
        # the likeliest token alone: sampling without chance
        generated(model, NAMES, batch, do_sample=True, top_k=1, num_return_sequences=3)

    def test_settings_of_the_model_count(self):
        model = two(config(), config(**OTHER))
        wake(model)
        model.generation_config.num_beams = 2
        generated(model, NAMES, padded(side="left"))

    def test_flylora_and_tasks(self):
        fly = RoutedAdapterConfig.from_preset("flylora", num_experts=4, top_k=2, target_modules=["q_proj", "up_proj"])
        poly = RoutedAdapterConfig.from_preset("poly", num_experts=3, r=2, num_tasks=2, target_modules=["q_proj"])
        model = two(fly, poly)
        wake_routers(model)
        # row 0's task exists for nobody: its adapter does not route by tasks
        tasks = {"task_ids": torch.tensor([7, 9, 1, 5, 0])}
        batch = padded(side="left")

        @torch.no_grad()
        def call(rows, **names):
            with routing_inputs(model, task_ids=tasks["task_ids"][rows]):
                return model.generate(
                    **{key: value[rows] for key, value in batch.items()}, max_new_tokens=4, do_sample=False, **names
                )

        expected = torch.cat(alone(model, call, NAMES))
        assert torch.equal(call(list(range(5)), adapter_names=NAMES), expected)

    @pytest.mark.parametrize("settings", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
    def test_encoder_and_decoder(self, settings):
        torch.manual_seed(0)
        base = T5ForConditionalGeneration(
            T5Config(
                vocab_size=61,
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                pad_token_id=0,
                decoder_start_token_id=0,
            )
        )
        options = dict(task_type="SEQ_2_SEQ_LM", scope="sequence")
        first = config(target_modules=["q", "k", "v", "wi", "wo"], **options)
        model = two(first, config(**{**OTHER, **options, "scope": "token", "target_modules": ["q", "wo"]}), base.eval())
        wake(model)
        found = generated(model, NAMES, padded(), **settings)
        model.set_adapter("a")
        assert not torch.equal(found, model.generate(**padded(), max_new_tokens=5, min_new_tokens=5, **settings))


class TestBaseExperts:
    @pytest.mark.parametrize("family", ["Mixtral", "GptOss", "DeepseekV3"])
    def test_each_row_its_experts(self, family):
        first = config(
            target_modules=["q_proj"] if family != "DeepseekV3" else ["o_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        second = config(target_modules=None, target_parameters=["experts.down_proj"], r=2)
        model = two(first, second, tiny_moe(family).eval())
        wake(model)
        batch = padded()
        found = forwarded(model, batch)
        assert not torch.allclose(found[2], logits(model, batch, [2])[0], atol=1e-3)
        generated(model, NAMES, padded(side="left"), num_beams=2)

    def test_merged_experts_are_named(self):
        method = config(target_modules=None, target_parameters=["experts.down_proj"])
        model = two(method, method, tiny_moe("Mixtral").eval())
        model.merge_adapter()
        with pytest.raises(RoutingError, match="unmerge_adapter"):
            model(**padded(), adapter_names=NAMES)

    def test_names_that_do_not_fit_the_rows(self):
        method = config(target_modules=None, target_parameters=["experts.down_proj"])
        model = two(method, method, tiny_moe("Mixtral").eval())
        with pytest.raises(RoutingError, match="has 2 names but the batch has 4 rows"):
            model(**padded(rows=4), adapter_names=["a", "b"])

    def test_linears_of_single_experts_are_named(self):
        torch.manual_seed(0)
        model = two(config(), config(**OTHER))
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        layer.path = "model.layers.0.mlp.experts.3.up_proj"
        with pytest.raises(RoutingError, match="rows cannot be told"):
            model(**padded(), adapter_names=NAMES)


class TestFurtherModules:
    @pytest.mark.parametrize("active", ["a", "b"])
    def test_a_copy_that_one_adapter_has(self, active):
        model = two(config(modules_to_save=["lm_head"]), config(**OTHER))
        wake(model)
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["a"].weight.mul_(-1.0)
        forwarded(model, padded(), active)
        assert model.active_adapter == active
        assert model.get_base_model().lm_head.active_adapters == (["a"] if active == "a" else [])

    def test_trained_tokens(self):
        options = dict(trainable_token_indices=batch_of(rows=5)["input_ids"][:, 0].tolist())
        model = two(config(**options), config(**OTHER))
        wake(model)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "trainable_tokens_delta" in key:
                    value.mul_(-2.0)
        forwarded(model, padded())


def test_a_model_without_sequences():
    """PEFT's own scenario: rows of numbers through two linears, every third row under the base."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(
        OrderedDict(first=torch.nn.Linear(10, 20), act=torch.nn.ReLU(), last=torch.nn.Linear(20, 3))
    )
    plain = dict(task_type=None, target_modules=["first", "last"])
    model = two(config(**plain, modules_to_save=None), config(**{**plain, "target_modules": ["last"]}), base.eval())
    wake(model)
    x = torch.randn(9, 10)
    names = ["__base__", "a", "b"] * 3

    @torch.no_grad()
    def call(rows, **given):
        return model(x[rows], **given)

    expected = torch.cat(alone(model, call, names))
    assert_close("outputs", call(list(range(9)), adapter_names=names), expected)
    with pytest.raises(RoutingError, match="has 5 names but the batch has 9 rows"):
        model(x, adapter_names=["a"] * 5)


class TestWhatIsLeft:
    def test_routers_of_a_block_and_of_the_model(self):
        for sharing in ("none", "block", "model"):
            model = two(config(router_sharing=sharing), config(**OTHER))
            wake(model)
            generated(model, NAMES, padded(side="left"))

    def test_other_rows_do_not_count_in_loads(self):
        model = two(config(top_k=1), config(**OTHER))
        wake(model)
        batch = {key: value[:3] for key, value in padded().items()}
        with torch.no_grad():
            with record_routing(model) as record:
                model(**batch, adapter_names=["a", "__base__", "b"])
            assert {site.rpartition(".")[2] for site in record} == {"a", "b"}
            model(**batch, adapter_names=["__base__", "a", "__base__"])
            found = routing_metrics(model)
            model(**{key: value[1:2] for key, value in batch.items()})
        assert found == pytest.approx(routing_metrics(model))
        assert found["load_share_max"] > 0

    def test_nothing_stays_behind(self):
        model = two(config(), config(**OTHER))
        wake(model)
        batch = padded()
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        with torch.no_grad():
            before = model(**batch).logits
            model(**batch, adapter_names=NAMES)
            with pytest.raises(RoutingError):
                model(**batch, adapter_names=["a"])
            assert torch.equal(model(**batch).logits, before)
        assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks

    def test_disabled_adapters_are_the_base(self):
        model = two(config(), config(**OTHER))
        wake(model)
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(**padded(), adapter_names=NAMES).logits, model(**padded()).logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "has 2 names but the batch has 5 rows"),
        (["a"] * 10, "has 10 names but the batch has 5 rows"),
        (["a", "b", "c", "d", "a"], "has 'c', 'd', expected names among a, b, or '__base__'"),
        ("a", "expected a list"),
        ([1, 2, 3, 4, 5], "expected a list"),
    ],
)
def test_names_that_do_not_fit(names, message):
    model = two(config(), config(**OTHER))
    with pytest.raises(RoutingError, match=message):
        model(**padded(), adapter_names=names)


def test_training_is_refused():
    model = two(config(), config(**OTHER)).train()
    with pytest.raises(RoutingError, match=r"model\.eval\(\) first"):
        model(**padded(), adapter_names=NAMES)


def test_layer_routers_refuse_by_name():
    model = get_peft_model(tiny_llama(layers=4).eval(), LayerRoutingConfig.from_preset("flexi"))
    with pytest.raises(RoutingError, match="adapter_names"):
        model(**padded(), adapter_names=["default"] * 5)
    with pytest.raises(RoutingError, match="adapter_names"):
        model.generate(**padded(), adapter_names=["default"] * 5, max_new_tokens=1)
