"""Options that a user of PEFT's LoRA brings along: each works as it does there, or is refused with its reason."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from moe_kit import ConfigError, RoutedAdapterConfig, RoutingError
from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.adapters.refused import REFUSED_OPTIONS
from moe_kit.routing.state import find_routing_state
from tests.conformance.common import NAME, config, take_loras, wake
from tests.tiny import batch_of, tiny_llama, tiny_moe
from tests.tolerances import assert_close

# embedded tokens of the batch that all tests share
ROWS = sorted(set(batch_of()["input_ids"].flatten().tolist()))[1:3]


def lora(**options):
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    return LoraConfig(init_lora_weights=False, **options)


def ours(**options):
    return config(**{"target_modules": ["q_proj"], **options})


METHODS = pytest.mark.parametrize("method", [lora, ours], ids=["lora", "ours"])


def wrapped(method, base=None, **options):
    model = get_peft_model(base or tiny_llama().eval(), method(**options), adapter_name=NAME)
    wake(model)
    return model


def trained_elsewhere(model):
    """Trainable parameters that are no part of the adapted linears."""
    return {key for key, value in model.named_parameters() if value.requires_grad and "q_proj" not in key}


def step(model):
    """One step of training, so that what is trained differs from where it began."""
    model.train()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    model(**batch_of()).loss.backward()
    optimizer.step()
    model.eval()


def reloaded(model, folder, **base):
    model.save_pretrained(folder, save_embedding_layers=False)
    return PeftModel.from_pretrained(tiny_llama(**base).eval(), folder / NAME, adapter_name="x").eval()


def logits(model):
    with torch.no_grad():
        return model(**batch_of()).logits


class TestTrainableTokens:
    @METHODS
    @pytest.mark.parametrize("tied", [False, True])
    def test_rows_are_trained_and_saved(self, method, tied, tmp_path):
        model = wrapped(method, tiny_llama(tie_word_embeddings=tied).eval(), trainable_token_indices=ROWS)
        (key,) = trained_elsewhere(model)
        assert key.endswith(f"embed_tokens.token_adapter.trainable_tokens_delta.{NAME}")
        before = tiny_llama(tie_word_embeddings=tied).model.embed_tokens.weight
        step(model)
        inner = model.get_base_model()
        after = inner.model.embed_tokens.token_adapter.get_merged_weights([NAME])
        moved = (after != before).any(1).nonzero()[:, 0].tolist()
        assert moved == ROWS
        assert torch.equal(inner.lm_head.weight.detach(), after.detach()) == tied
        expected = logits(model)
        assert torch.equal(logits(reloaded(model, tmp_path, tie_word_embeddings=tied)), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_llama(tie_word_embeddings=tied).eval()))

    def test_unload_gives_the_embedding_back(self):
        model = wrapped(ours, trainable_token_indices=[1])
        step(model)
        bare = model.unload()
        assert type(bare.model.embed_tokens) is nn.Embedding
        assert torch.equal(logits(bare), logits(tiny_llama().eval()))

    def test_native(self, tmp_path):
        model = tiny_llama().eval()
        model.add_adapter(ours(trainable_token_indices=[1, 5]), NAME)
        assert len(trained_elsewhere(model)) == 1


class TestWeightTying:
    @METHODS
    def test_a_trained_copy_of_the_embedding_stays_tied(self, method, tmp_path):
        tied = dict(tie_word_embeddings=True)
        options = dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        model = wrapped(method, tiny_llama(**tied).eval(), **options)
        step(model)
        inner = model.get_base_model()
        embedding = inner.model.embed_tokens.modules_to_save[NAME].weight
        assert inner.lm_head.modules_to_save[NAME].weight is embedding
        assert not torch.equal(embedding, tiny_llama(**tied).model.embed_tokens.weight)
        assert torch.equal(logits(reloaded(model, tmp_path, **tied)), logits(model))

    def test_an_adapter_on_a_tied_head_is_refused(self):
        base = tiny_llama(tie_word_embeddings=True)
        with pytest.raises(ConfigError, match="the two cannot be tied"):
            wrapped(ours, base, target_modules=["lm_head"], ensure_weight_tying=True)
        assert find_routing_state(base) is None

    @METHODS
    def test_without_it_peft_warns(self, method):
        with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set"):
            wrapped(method, tiny_llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"])


class TestAlphaPattern:
    def test_scale_of_each_linear(self):
        patterns = dict(rank_pattern={"v_proj": 4}, alpha_pattern={"layers.1.self_attn.q_proj": 6, "v_proj": 2})
        targets = dict(target_modules=["q_proj", "v_proj", "up_proj"], lora_alpha=4, r=2)
        plain = wrapped(lora, **patterns, **targets)
        model = wrapped(ours, **patterns, **targets)
        expected = {key: m.scaling[NAME] for key, m in plain.named_modules() if isinstance(m, LoraLayer)}
        found = {key: m.moe_adapter_bank[NAME].scale for key, m in model.named_modules() if isinstance(m, RoutedLayer)}
        assert found == expected
        assert set(found.values()) == {2.0, 3.0, 0.5}

    def test_one_expert_is_the_lora(self):
        options = dict(
            target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 5}, lora_alpha=3, use_rslora=True, r=3
        )
        plain = wrapped(lora, **options)
        model = wrapped(ours, **options, num_experts=1, top_k=1, losses={})
        take_loras(model, plain)
        assert_close("logits", logits(model), logits(plain.eval()))

    def test_experts_of_the_base(self):
        names = ["experts.gate_up_proj", "experts.down_proj"]
        method = config(
            target_modules=None, target_parameters=names, r=2, lora_alpha=4, alpha_pattern={"experts.down_proj": 7}
        )
        model = get_peft_model(tiny_moe("Mixtral"), method)
        (first, *_) = [module for module in model.modules() if isinstance(module, AdaptedExperts)]
        found = {name: stack.scale for name, stack in first.moe_adapter_bank["default"].items()}
        assert found == {"gate_up_proj": 2.0, "down_proj": 3.5}

    def test_saved_and_loaded(self, tmp_path):
        model = wrapped(ours, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 5})
        assert torch.equal(logits(reloaded(model.eval(), tmp_path)), logits(model))

    def test_refused_where_it_would_be_ignored(self):
        with pytest.raises(ConfigError, match=r"scale is 2\.0, which wins"):
            ours(alpha_pattern={"q_proj": 2}, scale=2.0)
        with pytest.raises(ConfigError, match=r"alpha_pattern has 'qproj'.*Did you mean 'q_proj'"):
            wrapped(ours, alpha_pattern={"qproj": 2})
        with pytest.raises(ConfigError, match="lora_alpha for 'q_proj' is 'much'"):
            ours(alpha_pattern={"q_proj": "much"})
        with pytest.raises(ConfigError, match="no regular expression"):
            ours(alpha_pattern={"(": 2})


class TestLayers:
    @METHODS
    def test_replicated_layers_have_adapters_of_their_own(self, method, tmp_path):
        options = dict(layer_replication=[[0, 2], [1, 2]], target_modules=["q_proj"])
        model = wrapped(method, **options).eval()
        layers = model.get_base_model().model.layers
        assert len(layers) == 3
        bases = [layer.self_attn.q_proj.get_base_layer().weight.data_ptr() for layer in layers]
        assert bases[1] == bases[2] != bases[0]
        adapters = [
            {value.data_ptr() for key, value in layer.named_parameters() if f".{NAME}." in key} for layer in layers
        ]
        assert all(adapters)
        assert not set.intersection(*adapters)
        deeper = tiny_llama(layers=3).eval()
        deeper.load_state_dict(
            {
                key.replace(".base_layer", ""): value
                for key, value in model.get_base_model().state_dict().items()
                if "lora_" not in key and "moe_adapter" not in key
            }
        )
        with model.disable_adapter():
            assert_close("logits", logits(model), logits(deeper))
        ids = batch_of()["input_ids"]
        cached = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False))
        assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))

    def test_all_linear_reaches_replicated_layers(self):
        model = wrapped(ours, target_modules="all-linear", layer_replication=[[0, 2], [0, 1]])
        assert sum(isinstance(module, RoutedLayer) for module in model.modules()) == 3 * 7

    def test_a_second_adapter_does_not_replicate_again(self):
        model = wrapped(ours, layer_replication=[(0, 2), (1, 2)])
        model.add_adapter("again", ours(layer_replication=[[0, 2], [1, 2]]))
        model.add_adapter("none", ours())
        assert len(model.get_base_model().model.layers) == 3
        with pytest.raises(ConfigError, match="replicate with the first adapter"):
            model.add_adapter("other", ours(layer_replication=[[0, 1], [0, 2]]))

    def test_experts_of_replicated_layers_cannot_be_merged(self):
        method = config(
            target_modules=None, target_parameters=["experts.down_proj"], layer_replication=[[0, 2], [1, 2]]
        )
        model = get_peft_model(tiny_moe("Mixtral"), method)
        with pytest.raises(RoutingError, match="share their weights"):
            model.merge_and_unload()

    @pytest.mark.parametrize("bad", [[[0]], [[2, 1]], [[-1, 1]], [["a", 2]]])
    def test_replication_is_pairs(self, bad):
        with pytest.raises(ConfigError, match="layer_replication has"):
            ours(layer_replication=bad)

    @METHODS
    def test_layers_of_an_expression_are_refused(self, method):
        for options in (dict(layers_to_transform=[0]), dict(layers_pattern="layers", layers_to_transform=[0])):
            with pytest.raises(ValueError, match="layers_to_transform"):
                method(target_modules=r".*q_proj", **options)
        with pytest.raises(ValueError, match="layers_pattern"):
            method(layers_pattern="layers")

    @METHODS
    def test_excluded_modules_stay_plain(self, method):
        options = dict(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.v_proj"])
        model = wrapped(method, **options)
        adapted = [key for key, m in model.named_modules() if isinstance(m, (LoraLayer, RoutedLayer))]
        assert sorted(key.split("layers.")[1] for key in adapted) == [
            "0.self_attn.q_proj",
            "1.self_attn.q_proj",
            "1.self_attn.v_proj",
        ]


class TestNothingMatched:
    @pytest.mark.parametrize(
        "options",
        [
            dict(target_modules=["q_proj", "v_proj"], exclude_modules=["q_proj", "v_proj"]),
            dict(target_modules=r".*(q|v)_proj", exclude_modules=r".*self_attn.*"),
        ],
    )
    def test_exclusion_is_named(self, options):
        with pytest.raises(
            ConfigError, match=r"exclude_modules = .*q_proj \(2\), v_proj \(2\) would be adapted without"
        ):
            wrapped(ours, **options)

    def test_of_all_linears(self):
        with pytest.raises(ConfigError, match=r"exclude_modules = .* down_proj \(2\) would be adapted without"):
            wrapped(ours, target_modules="all-linear", exclude_modules=r".*")

    def test_modules_to_save_count(self):
        with pytest.raises(ConfigError, match=r"modules_to_save = \['q_proj'\].*q_proj \(2\) would be adapted"):
            wrapped(ours, target_modules=["q_proj"], modules_to_save=["q_proj"])

    def test_of_a_second_adapter(self):
        model = wrapped(ours, target_modules=["q_proj"])
        with pytest.raises(ConfigError, match=r"q_proj \(2\) would be adapted without"):
            model.add_adapter("second", ours(target_modules=["q_proj"], exclude_modules=["q_proj"]))
        with pytest.raises(ConfigError, match=r"Its linears: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj"):
            model.add_adapter("third", ours(target_modules=["nothing_like_it"]))

    def test_a_wrong_name_is_still_that(self):
        with pytest.raises(ConfigError, match=r"q_prj.*Did you mean 'q_proj'"):
            wrapped(ours, target_modules=["q_prj"], exclude_modules=["v_proj"])


@METHODS
def test_widths_of_a_wrapped_linear(method):
    model = wrapped(method, target_modules=["up_proj", "v_proj"])
    found = {
        (key.rpartition(".")[2], module.in_features, module.out_features)
        for key, module in model.named_modules()
        if isinstance(module, (LoraLayer, RoutedLayer))
    }
    assert found == {("up_proj", 16, 24), ("v_proj", 16, 8)}


def test_an_adapter_that_joins_in_evaluation_mode_neither_samples_nor_drops():
    model = wrapped(ours, target_modules=["q_proj"]).eval()
    model.add_adapter("late", ours(preset="remix", target_modules=["q_proj"], dropout=0.5))
    experts = get_peft_model(tiny_moe("Mixtral"), config(target_modules=None, target_parameters=["experts.down_proj"]))
    experts.eval().add_adapter(
        "late", config(target_modules=None, target_parameters=["experts.down_proj"], dropout=0.5)
    )
    assert not any(module.training for each in (model, experts) for module in each.modules())


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_refused_options_say_why(name):
    for make in (RoutedAdapterConfig, lambda **options: RoutedAdapterConfig.from_preset("mixture_of_lora", **options)):
        with pytest.raises(ConfigError, match=re.escape(REFUSED_OPTIONS[name])):
            make(**{name: True})
