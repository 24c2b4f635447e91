"""Model families beyond Llama: GPT-2's Conv1D, T5's two sides, BERT's pooled head, mixture-of-experts bases."""

import logging

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from moe_kit import record_routing, routing_losses
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.routing.state import require_routing_state
from tests.conformance.common import NAME, config, gradients, wake
from tests.tiny import tiny_llama
from tests.tolerances import assert_close


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0))


def t5(cls=T5ForConditionalGeneration):
    sizes = dict(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return cls(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0, initializer_factor=0.5))


def bert():
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=3, pad_token_id=0, initializer_range=0.3))


MOE = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    num_experts_per_tok=2,
    pad_token_id=0,
)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4))


def qwen3_moe():
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=12, head_dim=8))


def wrap(base, task="CAUSAL_LM", **overrides):
    torch.manual_seed(0)
    base.eval()
    model = get_peft_model(
        base, config(**{"target_modules": "all-linear", "task_type": task, **overrides}), adapter_name=NAME
    )
    wake(model)
    return model.eval()


def seeded(build):
    torch.manual_seed(1)
    return build()


def adapted(model):
    return sorted(
        {path.removeprefix("base_model.model.") for path, m in model.named_modules() if isinstance(m, RoutedLayer)}
    )


def context(model):
    return require_routing_state(model).context


IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
MASK = (IDS != 0).long()

CAUSAL = {"gpt2": gpt2, "mixtral": mixtral, "qwen3_moe": qwen3_moe}


class TestCausal:
    @pytest.mark.parametrize("family", CAUSAL)
    def test_life(self, family, tmp_path):
        """Fresh: the base; awake: another; trains; saves; generates with padding on the left."""
        from peft import PeftModel

        base = seeded(CAUSAL[family]).eval()
        expected = base(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        model = get_peft_model(base, config(target_modules="all-linear"), adapter_name=NAME)
        torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()], expected)
        wake(model)
        awake = model.eval()(input_ids=IDS, attention_mask=MASK).logits
        assert not torch.allclose(awake[MASK.bool()], expected, atol=1e-3)
        labels = IDS.masked_fill(MASK == 0, -100)
        model.train()(input_ids=IDS, attention_mask=MASK, labels=labels).loss.backward()
        trained = {key for key, value in model.named_parameters() if value.requires_grad}
        assert set(gradients(model)) == trained
        assert all(value.isfinite().all() for value in gradients(model).values())
        assert set(routing_losses(model)) == {"switch"}
        model.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(seeded(CAUSAL[family]).eval(), tmp_path / NAME).eval()
        assert torch.equal(loaded(input_ids=IDS, attention_mask=MASK).logits, awake)
        short = IDS[1:, :3]
        padded = torch.nn.functional.pad(short, (2, 0))
        options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
        alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **options)
        both = model.generate(
            input_ids=torch.cat([IDS[:1], padded]),
            attention_mask=torch.cat([MASK[:1], (padded != 0).long()]),
            **options,
        )
        assert torch.equal(both[1, 5:], alone[0, 3:])

    def test_gpt2_adapts_its_conv1d(self):
        model = wrap(seeded(gpt2))
        assert {path.rpartition(".")[2] for path in adapted(model)} == {"c_attn", "c_proj", "c_fc"}


class TestMixtureBases:
    @pytest.mark.parametrize("build", [mixtral, qwen3_moe])
    def test_all_linear_leaves_router_and_experts(self, build, caplog):
        with caplog.at_level(logging.WARNING, logger="moe_kit"):
            model = wrap(seeded(build))
        assert {path.rpartition(".")[2] for path in adapted(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert len(adapted(model)) == 8
        assert "q_proj (2)" in caplog.text
        assert "left alone" in caplog.text
        base = {key for key, value in model.named_parameters() if value.requires_grad and "moe_adapter" not in key}
        assert not base

    def test_linear_experts_and_routers_are_left_out_unless_named(self):
        class Block(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = torch.nn.Linear(16, 4, bias=False)
                self.shared_expert_gate = torch.nn.Linear(16, 1, bias=False)
                self.shared_expert = torch.nn.Linear(16, 16)
                self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

            def forward(self, x):
                flat = x.view(-1, 16)
                weights = self.gate(flat).softmax(-1)
                mixed = sum(w[:, None] * e(flat) for w, e in zip(weights.unbind(-1), self.experts))
                return (mixed + self.shared_expert_gate(flat).sigmoid() * self.shared_expert(flat)).view(x.shape)

        def base():
            model = tiny_llama().eval()
            for layer in model.model.layers:
                layer.mlp = Block()
            return model

        found = {path.rpartition(".")[2] for path in adapted(wrap(base()))}
        assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "shared_expert"}
        named = wrap(base(), target_modules=["gate"])
        assert adapted(named) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
        named(input_ids=IDS, attention_mask=MASK)
        # the block flattens its tokens; decisions about sequences still find them
        rows = wrap(base(), target_modules=["shared_expert"], scope="sequence")
        together = rows(input_ids=IDS[:, :3]).logits
        torch.testing.assert_close(rows(input_ids=IDS[1:, :3]).logits[0], together[1])
        assert context(rows).registered[0][1].num_decisions == 1

    def test_a_gate_of_a_dense_model_is_a_linear(self):
        model = tiny_llama().eval()
        for layer in model.model.layers:
            layer.mlp.gate = torch.nn.Linear(16, 24)
            layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(mlp.gate(x))
        assert "model.layers.0.mlp.gate" in adapted(wrap(model))


class TestEncoderDecoder:
    SOURCE, TARGET = IDS, torch.tensor([[20, 21, 22, 23, 24, 25, 26], [30, 31, 32, -100, -100, -100, -100]])

    def run(self, model, source=None, target=None):
        source = self.SOURCE if source is None else source
        target = self.TARGET if target is None else target
        return model(input_ids=source, attention_mask=(source != 0).long(), labels=target, use_cache=False)

    @pytest.mark.parametrize("scope", ["token", "sequence"])
    @pytest.mark.parametrize("sharing", ["input", "block", "model"])
    def test_masks_are_kept_apart(self, scope, sharing):
        """A row gives the same alone, unpadded, on both sides."""
        model = wrap(seeded(t5), "SEQ_2_SEQ_LM", scope=scope, router_sharing=sharing)
        together = self.run(model).logits[1, :3]
        alone = self.run(model, source=self.SOURCE[1:, :3], target=self.TARGET[1:, :3]).logits[0]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)

    def test_loads_count_each_side_by_its_own_mask(self):
        model = wrap(seeded(t5), "SEQ_2_SEQ_LM")
        self.run(model)
        for site, routing, _ in context(model).registered:
            encoder = site.startswith("encoder") or ("EncDecAttention" in site and site.split(".")[-2] in ("k", "v"))
            real = 8 if encoder else 10
            assert routing.load_E().sum() == 2 * real, site
        sites = [site for site, _, _ in context(model).registered]
        assert any(site.startswith("encoder") for site in sites)
        assert any("EncDecAttention.k" in site for site in sites)
        assert any("EncDecAttention.q" in site for site in sites)

    def test_training_with_checkpointing(self):
        found = []
        for checkpointing in (False, True):
            model = wrap(seeded(t5), "SEQ_2_SEQ_LM").train()
            if checkpointing:
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
            loss = self.run(model).loss
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        assert_close("loss", found[1][0], found[0][0])
        assert found[0][1].keys() == found[1][1].keys()
        for key, value in found[0][1].items():
            assert_close(key, found[1][1][key], value)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
    @pytest.mark.parametrize("scope", ["token", "sequence"])
    def test_generation_calls_the_encoder_alone(self, scope, options):
        model = wrap(seeded(t5), "SEQ_2_SEQ_LM", scope=scope)
        limits = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
        with record_routing(model) as record:
            together = model.generate(input_ids=self.SOURCE, attention_mask=MASK, **limits)
        assert any(site.startswith("encoder") for site in record)
        short = self.SOURCE[1:, :3]
        alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **limits)
        assert torch.equal(together[1], alone[0])
        assert not context(model).is_open

    def test_prompt_of_the_decoder_is_its_start(self):
        """A decision about the decoder's sequence sees in training what it sees while decoding."""
        model = wrap(seeded(t5), "SEQ_2_SEQ_LM", scope="sequence")
        self.run(model)
        assert context(model).prompt_mask_BS.sum(1).tolist() == [1, 1]
        other = self.TARGET.clone()
        other[:, 1:][other[:, 1:] > 0] = 40
        one = [r.dense_NE() for s, r, _ in context(model).registered if s.startswith("decoder")]
        self.run(model, target=other)
        two = [r.dense_NE() for s, r, _ in context(model).registered if s.startswith("decoder")]
        assert torch.equal(one[0], two[0]), "the first decoder layer's decision must not depend on the answer"

    def test_encoder_model(self):
        model = wrap(seeded(lambda: t5(T5EncoderModel)), "FEATURE_EXTRACTION")
        whole = model(input_ids=IDS, attention_mask=MASK).last_hidden_state[1, :3]
        torch.testing.assert_close(model(input_ids=IDS[1:, :3]).last_hidden_state[0], whole, rtol=1e-4, atol=1e-4)


class TestClassification:
    def test_bert(self):
        model = wrap(seeded(bert), "SEQ_CLS", modules_to_save=["classifier"])
        assert "bert.pooler.dense" in adapted(model)
        assert not [path for path in adapted(model) if "classifier" in path]
        together = model(input_ids=IDS, attention_mask=MASK).logits
        alone = model(input_ids=IDS[1:, :3]).logits
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)
        pooled = {site: r for site, r, _ in context(model).registered}[f"bert.pooler.dense.{NAME}"]
        assert pooled.num_decisions == 1
        out = model.train()(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 2]))
        out.loss.backward()
        assert any("pooler" in key for key in gradients(model))
        assert any("router" in key for key in gradients(model))
        # PEFT keeps a copy of every head that it finds by its name; a router's score must not look like one
        assert [key for key in model.state_dict() if "modules_to_save" in key and "moe_adapter" in key] == []

    def test_bert_sequence_scope(self):
        model = wrap(seeded(bert), "SEQ_CLS", scope="sequence")
        together = model(input_ids=IDS, attention_mask=MASK).logits
        alone = model(input_ids=IDS[1:, :3]).logits
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)

    def test_backbone_alone(self):
        """A part of the model that is called on its own has a pass of its own."""
        model = wrap(tiny_llama())
        inner = model.get_base_model().model
        hidden = inner(input_ids=IDS, attention_mask=MASK).last_hidden_state
        assert len(context(model).registered) == 8
        assert not context(model).is_open
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(model.get_base_model().lm_head(hidden), logits)
