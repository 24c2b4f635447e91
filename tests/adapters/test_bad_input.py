"""Wrong input gives a typed error that says what is wrong; empty input gives finite results."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from moe_kit import RoutedAdapterConfig, record_routing, replay_routing, routing_inputs, routing_losses
from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing import force_experts
from tests.tiny import tiny_llama, wake_banks

IDS = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(3))


def config(preset="mixture_of_lora", **more):
    preset = more.pop("preset", preset)
    return RoutedAdapterConfig.from_preset(
        preset, **{"num_experts": 4, "top_k": 2, "r": 2, "target_modules": "all-linear", **more}
    )


def wrapped(preset="mixture_of_lora", **more):
    return get_peft_model(tiny_llama(), config(preset, **more), adapter_name="skills_a").eval()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"top_k": 5}, "top_k is 5 but a module has only 4 experts"),
        ({"top_k": 0}, "top_k is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"rank_pattern": {"q_proj": 0}}, "r for 'q_proj' is 0"),
        ({"expert_pattern": {"q_proj": 1}}, "only 1 experts"),
        ({"expert_layout": []}, "expert_layout"),
        ({"expert_layout": [4, 1]}, "only 1 experts"),
        ({"expert_layout": [4, 2], "expert_pattern": {"q_proj": 1}}, "only 1 experts"),
        ({"expert_pattern": {"q_proj": True}}, "num_experts for 'q_proj' is True"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"bank": "rank_one", "dropout": 0.1}, "no input of their own under score 'linear'"),
        ({"router_sharing": "layer"}, "router_sharing is 'layer'"),
        ({"causal_leak": "yes"}, "causal_leak is 'yes'"),
        ({"scope": "task"}, "task table needs scope 'task'"),
        ({"scope": "task", "score": "task_table"}, "num_tasks is not set"),
        ({"scope": "task", "score": "task_table", "num_tasks": 0}, "num_tasks is 0"),
        ({"num_expert": 4}, "Did you mean 'num_experts'"),
        ({"preset": "remoe", "top_k": 5}, "top_k is 5 but a module has only 4 experts"),
        ({"rank_pattern": {"q_proj(": 2}}, "no regular expression"),
    ],
)
def test_configurations_are_checked_when_made(values, match):
    with pytest.raises(ConfigError, match=match):
        config(**values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"select": "topk"}, "Did you mean 'top_k'"),
        ({"score": "liner"}, "Did you mean 'linear'"),
        ({"weight": "softmx"}, "Did you mean 'softmax'"),
        ({"bank": "lor"}, "Did you mean 'lora'"),
        ({"scope": "tokens"}, "Did you mean 'token'"),
        ({"stepper": "lossfree"}, "Did you mean 'loss_free'"),
        ({"losses": {"swich": 0.1}}, "Did you mean 'switch'"),
        ({"select_options": {"num_group": 2}}, "select_options do not fit .* Did you mean 'num_groups'"),
        ({"stepper": "loss_free", "stepper_options": {"bin": 1}}, "stepper_options do not fit .* Did you mean 'bins'"),
        ({"stepper": "loss_free", "stepper_options": {"speed": 1}}, "Known: bins, gate, rate, rule, span"),
        ({"score_options": {"gitter": 0.1}}, "score_options do not fit .* Did you mean 'jitter'"),
        ({"bank_options": {"froze": True}}, "bank_options do not fit .* Did you mean 'frozen'"),
        ({"bank_options": {"scale": 2.0}}, "bank_options do not fit .* multiple values"),
        ({"scope_options": {"pool": "inputs"}}, "scope_options do not fit"),
        ({"scope": "sequence", "scope_options": {"pol": "logits"}}, "Did you mean 'pool'"),
        ({"scope": "sequence", "scope_options": {"pool": "logit"}}, "pool is 'logit', expected one of inputs, logits"),
        ({"scope": "request", "scope_options": {"pool": "mean"}}, "pool is 'mean'"),
        ({"weight": "sigmoid", "weight_options": {"renormalize": True}}, "Did you mean 'renormalise'"),
        ({"weight": "indicator", "weight_options": {"temperature": 2}}, "weight_options do not fit"),
        ({"losses": {"cv_typed": 0.1}, "loss_options": {"cv_typed": {"delt": 0.1}}}, "Did you mean 'delta'"),
        ({"select": "all", "select_options": {"p": 0.5}}, "select_options do not fit"),
        ({"score": "mlp", "score_options": {"activation": "gleu"}}, "activation is 'gleu', expected one of gelu, silu"),
        ({"score": "mlp", "score_options": {"hidden": 0}}, "hidden layer has 0 units"),
        ({"score": "mlp", "score_options": {"hiden": 8}}, "Did you mean 'hidden'"),
        ({"select_options": {"num_groups": 4, "groups_kept": 1}}, "top_k is 2, but 1 of 4 groups hold 1 of 4 experts"),
        ({"select_options": {"num_groups": 3, "groups_kept": 2}}, "4 experts do not fall into 3 equal groups"),
        ({"select": "expert_choice", "causal_leak": "allow", "select_options": {"threshold": "mean"}}, "'mean'"),
        ({"target_modules": ["no_such_linear"]}, "no_such_linear"),
        ({"expert_layout": [2, 2, 2]}, "3 parts but the model 2 layers"),
        ({"rank_pattern": {"qproj": 3}}, "rank_pattern has 'qproj', .* Did you mean 'q_proj'"),
        ({"expert_pattern": {"layers.0": 3}}, "expert_pattern has 'layers.0', .* 'layers.0.\\*' is a layer"),
        ({"expert_pattern": {"q_proj": 3, "embed_tokens": 3}}, "embed_tokens"),
        ({"rank_pattern": {"q_proj": 3}, "target_modules": ["v_proj"]}, "which matches no module that is adapted"),
        ({"rank_pattern": {"q_proj": 3}, "target_modules": ["no_such_linear"]}, "matches no linear"),
    ],
)
def test_parts_are_checked_when_the_model_is_wrapped(values, match):
    with pytest.raises(ConfigError, match=match):
        wrapped(**values)


@pytest.mark.parametrize(
    "pattern", ["q|v_proj", "q_proj|v_proj", r"layers\.0\..*", r".*\.0\.self_attn\.q_proj", "proj"]
)
def test_patterns_mean_what_they_mean_for_a_lora(pattern):
    """Ranks at every linear are those of PEFT's LoRA with the same pattern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", rank_pattern={pattern: 5}))
    expected = {
        name.removesuffix(".lora_A.default"): module.out_features
        for name, module in lora.base_model.model.named_modules()
        if name.endswith("lora_A.default")
    }
    if 5 not in expected.values():
        with pytest.raises(ConfigError, match="matches no module"):
            wrapped(rank_pattern={pattern: 5})
        return
    ours = wrapped(rank_pattern={pattern: 5}, expert_pattern={pattern: 3}, router_sharing="none").base_model.model
    found = {name: module for name, module in ours.named_modules() if hasattr(module, "moe_adapter_bank")}
    assert {name: module.moe_adapter_bank["skills_a"].rank for name, module in found.items()} == expected
    for name, module in found.items():
        assert module.moe_adapter_bank["skills_a"].num_experts == (3 if expected[name] == 5 else 4)


def test_a_layout_may_name_layers_that_are_not_adapted():
    model = wrapped(expert_layout=[2, 4], layers_to_transform=[1])
    banks = [m.moe_adapter_bank["skills_a"] for m in model.modules() if hasattr(m, "moe_adapter_bank")]
    assert {bank.num_experts for bank in banks} == {4}


def test_unknown_presets_name_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'hydralora'"):
        RoutedAdapterConfig.from_preset("hydra_lora")


@pytest.mark.parametrize(
    "refused", [config("expert_choice"), config(rank_pattern={"qproj": 3})], ids=["expert choice", "pattern"]
)
def test_a_refused_adapter_leaves_no_trace(refused):
    model = tiny_llama()
    keys = set(model.state_dict())
    with pytest.raises(ConfigError):
        get_peft_model(model, refused)
    assert set(model.state_dict()) == keys
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_task_ids():
    model = wrapped("poly", num_tasks=3)
    with pytest.raises(RoutingError, match="got no task ids"):
        model(input_ids=IDS)
    for ids, match in (([0, 3], r"\[0, 3\], expected \[0, 2\]"), ([-1, 0], r"\[-1, 0\]"), ([0, 1, 2], "3 rows")):
        with routing_inputs(model, task_ids=ids), pytest.raises(RoutingError, match=match):
            model(input_ids=IDS)


def test_replayed_records():
    model = wrapped()
    with record_routing(model) as record:
        model(input_ids=IDS)
    site = next(iter(record))

    def changed(value):
        return {**record, site: value}

    ids = record[site]
    low, high, twice = ids.clone(), ids.clone(), ids.clone()
    low[0, 0], high[0, 0], twice[0] = -2, 4, 1
    for given, match in (
        (changed(low), r"\[-2, 3\]"),
        (changed(high), "expected"),
        (changed(twice), "twice in one decision"),
        (changed(ids[:-1]), "11 decisions"),
    ):
        with replay_routing(model, given), pytest.raises(RoutingError, match=match):
            model(input_ids=IDS)
    with replay_routing(model, record), pytest.raises(RoutingError, match="same batch"):
        model(input_ids=IDS[:1])
    model(input_ids=IDS)


def test_forced_experts():
    model = wrapped()
    with pytest.raises(RoutingError, match="not both"), force_experts(model):
        pass
    for arguments, match in (
        ({"ids_BK": torch.tensor([[4]])}, "expected"),
        ({"ids_BK": torch.tensor([[0], [1], [2]])}, "3 rows"),
        ({"weights_BE": torch.ones(1, 3)}, "3 experts"),
    ):
        with force_experts(model, **arguments), pytest.raises(RoutingError, match=match):
            model(input_ids=IDS)


def test_priors_and_masks_that_do_not_fit():
    model = wrapped()
    with routing_inputs(model, prior=torch.zeros(2, 3)), pytest.raises(RoutingError, match="prior has 3 experts"):
        model(input_ids=IDS)
    with routing_inputs(model, prior=torch.zeros(3, 4)), pytest.raises(RoutingError, match="3 rows"):
        model(input_ids=IDS)
    with pytest.raises(RoutingError, match="no moe_kit routers"), routing_inputs(tiny_llama()):
        pass


PADDED = {"mixture_of_lora": {}, "remix": {"scope": "sequence"}, "expert_choice": {"causal_leak": "allow"}}
PADDED |= {name: {} for name in ("dense_lora_moe", "loss_free", "adamole", "remoe", "flylora")}


@pytest.mark.parametrize("preset", PADDED)
def test_a_row_of_padding_alone_gives_finite_results_where_it_is_not_refused(preset, monkeypatch):
    """On an accelerator: the check would have to wait for it."""
    monkeypatch.setattr("moe_kit.hf.hooks.check_rows", lambda mask: None)
    model = wrapped(preset, **PADDED[preset]).train()
    wake_banks(model)
    mask = torch.tensor([[1] * 6, [0] * 6])
    out = model(input_ids=IDS, attention_mask=mask).logits[0]
    losses = routing_losses(model)
    (out.square().mean() + sum(losses.values(), torch.zeros(()))).backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(loss) for loss in losses.values())
    for name, value in model.named_parameters():
        if value.grad is not None:
            assert torch.isfinite(value.grad).all(), name


def test_expert_choice_on_a_causal_model_is_refused_unless_asked_for():
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM is causal.*threshold.*ema.*causal_leak='allow'"):
        wrapped("expert_choice")
    wrapped("expert_choice", causal_leak="allow")
    wrapped("expert_choice", select_options={"threshold": "ema"})


def test_gshard_on_a_causal_model_is_refused_unless_asked_for():
    gshard = {"select": "capacity", "select_options": {"policy": "gshard"}}
    with pytest.raises(ConfigError, match=r"second choice finds room.*'policy': 'switch'.*causal_leak='allow'"):
        wrapped(**gshard)
    wrapped(**gshard, causal_leak="allow")
    wrapped(select="capacity")


def test_expert_choice_fits_bidirectional_models():
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24),
        add_pooling_layer=False,
    )
    model = get_peft_model(bert, config("expert_choice", target_modules=["query", "value"])).eval()
    assert torch.isfinite(model(input_ids=IDS).last_hidden_state).all()
    config(select="capacity", select_options={"policy": "gshard"}).check_model(bert)


@pytest.mark.parametrize("options", [{"threshold": "ema"}, {}])
def test_a_future_token_and_the_past(options):
    """In training as well: the threshold form keeps the past, the other does not."""
    model = wrapped("expert_choice", select_options=options, causal_leak="allow").train()
    wake_banks(model)
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 5) % 60 + 1
    past = [model(input_ids=ids).logits[:, :-1] for ids in (IDS, changed)]
    assert torch.allclose(*past, atol=1e-5) == ("threshold" in options)


def test_experts_by_layer_follow_the_layout():
    model = get_peft_model(tiny_llama(4), config("mola", expert_layout=[2, 3, 4, 6]))
    found = {}
    for name, module in model.named_modules():
        if name.endswith("moe_adapter_bank.default"):
            found.setdefault(int(name.split("layers.")[1].split(".")[0]), set()).add(module.num_experts)
    assert found == {0: {2}, 1: {3}, 2: {4}, 3: {6}}


def test_freezing_fields():
    def trainable(**more):
        return {
            name.split(".moe_adapter_")[1].split(".")[0]
            for name, value in wrapped(**more).named_parameters()
            if value.requires_grad
        }

    assert trainable() == {"bank", "router"}
    assert trainable(freeze_router=True) == {"bank"}
    assert trainable(freeze_experts=True) == {"router"}
    assert trainable(preset="mhr_z", bank_options={"heads": 2}) == {"router"}
