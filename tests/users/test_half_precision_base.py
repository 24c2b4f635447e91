"""Adapters in float32 on a base that was loaded in bfloat16 or float16: the base's product in half, all else in float32, rounded once."""

import pytest
import torch
from moe_kit_kernels.common.native import KernelError
from moe_kit_kernels.lora_experts import dispatch, native
from peft import LoraConfig, get_peft_model

from moe_kit import RoutedAdapterConfig
from moe_kit.adapters.layer import RoutedLayer
from tests.adapters.rule_cases import ADAPTER, CASES
from tests.tiny import tiny_llama, wake_banks
from tests.tolerances import assert_close

HALVES = [torch.bfloat16, torch.float16]
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(4))


def layers(model):
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def seen(model, run):
    """What every adapted linear got, gave and decided in one call of `run`."""
    found, handles = [], []

    def hook(layer, args, y):
        routing = layer.state.context.routings[layer.sites[layer.active_adapter[0]]]
        found.append((layer, args[0].detach(), routing, y.detach()))

    for layer in layers(model):
        handles.append(layer.register_forward_hook(hook))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == len(layers(model))
    return found


@torch.no_grad()
def check(found, dtype):
    """Results equal the base's half output plus the mixture in float32, up to one rounding of each."""
    for layer, x, routing, y in found:
        assert y.dtype is dtype
        assert all(p.dtype is torch.float32 for p in layer.moe_adapter_bank.parameters())
        base, x_TD = layer.base_layer(x), x.reshape(-1, x.shape[-1])
        bank = layer.moe_adapter_bank[layer.active_adapter[0]].eval()
        start = (
            base.float()
            if routing.base_weight_T is None
            else base.float() * routing.base_weight_T.view(*x.shape[:-1], 1)
        )
        expected = start + bank(x_TD.float(), routing).view(base.shape)
        bound = torch.finfo(dtype).eps * (base.float().abs() + expected.abs()) + 1e-6
        worst = ((y.float() - expected).abs() / bound).max()
        assert worst <= 1, f"{layer.path}: {worst:.1f} roundings off"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_every_preset(case, dtype):
    """A prompt without gradients and a pass with them."""
    model = CASES[case].model(base=tiny_llama().to(dtype).eval())
    found = seen(model, lambda: CASES[case].logits(model, IDS))
    check(found, dtype)
    with torch.no_grad():
        check(seen(model, lambda: CASES[case].logits(model, IDS)), dtype)


def adapted(dtype, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), **settings):
    values = {
        "num_experts": 4,
        "top_k": 2,
        "r": 8,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        **settings,
    }
    model = get_peft_model(
        tiny_llama(width=256).to(dtype), RoutedAdapterConfig.from_preset("mixture_of_lora", **values)
    )
    wake_banks(model)
    return model.eval()


@pytest.mark.parametrize("compiled", [True, False], ids=["C++", "plain PyTorch"])
@pytest.mark.parametrize("dtype", HALVES)
def test_decoding(dtype, compiled, monkeypatch):
    """Tokens one by one, in the step that looks its tensors up once; nothing is written past a buffer of half the width."""
    monkeypatch.setattr(dispatch, "chosen_form", lambda *sizes, training, **_: "dense" if training else "decode")
    if not compiled:
        monkeypatch.setattr(native.NATIVE, "_found", (None, "switched off"), raising=False)
    model = adapted(dtype)
    steps = lambda: sum(step is not None for layer in layers(model) for step in layer.steps.values())  # noqa: E731
    with torch.no_grad():
        cache = model(input_ids=IDS[:1, :6]).past_key_values
        for place in range(6, 9):
            token = IDS[:1, place : place + 1]
            check(seen(model, lambda token=token: model(input_ids=token, past_key_values=cache)), dtype)
        assert steps() == 8, "q, o, gate and down of two layers look their groups up"
        # several rows, and adapters that are as narrow as the base
        check(seen(model, lambda: model(input_ids=IDS[:, :1])), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_adapters_as_narrow_as_the_base(dtype, monkeypatch):
    """The user asked for them: sums are float32 still."""
    monkeypatch.setattr(dispatch, "chosen_form", lambda *sizes, training, **_: "dense" if training else "decode")
    model = adapted(dtype)
    for layer in layers(model):
        layer.moe_adapter_bank.to(dtype)
    found = []
    with torch.no_grad():
        for _ in range(2):
            found = seen(model, lambda: model(input_ids=IDS[:1, :1]))
        for layer, x, routing, y in found:
            bank = layer.moe_adapter_bank[ADAPTER if ADAPTER in layer.sites else "default"]
            wide = [value.float() for value in (bank.A, bank.B)]
            h = torch.einsum(
                "ktd,kld->ktl", x.view(1, 1, -1).float().expand(2, 1, -1), wide[0][routing.expert_ids_TK[0]]
            )
            mixture = (
                torch.einsum("k,ktl,kol->to", routing.weights_TK[0], h, wide[1][routing.expert_ids_TK[0]]) * bank.scale
            )
            assert_close(layer.path, y.view(1, -1), (layer.base_layer(x).view(1, -1).float() + mixture).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 9, 64])
@pytest.mark.parametrize("group", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)])
def test_gradients(group, dtype, tokens):
    """Those of A, B and the router are what autograd gives in float32; that of x is rounded once a linear."""
    model = adapted(dtype).train()
    linears = [next(layer for layer in layers(model) if layer.path.endswith(f"layers.0.{name}")) for name in group]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, tokens, linears[0].width_in, generator=generator).to(dtype).requires_grad_()
    dys = [torch.randn(1, tokens, layer.width_out, generator=generator).to(dtype) for layer in linears]
    leaves = {name: p for layer in linears for name, p in layer.named_parameters(layer.path) if p.requires_grad}
    found = torch.autograd.grad([layer(x) for layer in linears], [x, *leaves.values()], dys)

    def one(layer, routing):
        bank = layer.moe_adapter_bank["default"]
        return layer.base_layer(x) + bank(x.reshape(tokens, -1).float(), routing).view(1, tokens, -1)

    router = linears[0].moe_adapter_router["default"]
    routing = router(x.float())
    expected = torch.autograd.grad(
        [one(layer, routing) for layer in linears], [x, *leaves.values()], [dy.float() for dy in dys]
    )
    assert_close("x", found[0], expected[0])
    for name, actual, wanted in zip(leaves, found[1:], expected[1:], strict=True):
        assert actual.dtype is torch.float32
        assert_close(name, actual, wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_one_expert_equals_plain_lora(dtype):
    routed = adapted(dtype, num_experts=1, top_k=1, lora_alpha=16)
    plain = get_peft_model(
        tiny_llama(width=256).to(dtype),
        LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    ).eval()
    theirs = {
        name: module
        for name, module in plain.named_modules()
        if hasattr(module, "lora_A") and "lora_A" in module._modules
    }
    with torch.no_grad():
        for layer in layers(routed):
            bank, lora = (
                layer.moe_adapter_bank["default"],
                theirs["base_model.model." + layer.path.removeprefix("base_model.model.")],
            )
            lora.lora_A["default"].weight.copy_(bank.A[0])
            lora.lora_B["default"].weight.copy_(bank.B[0])
        assert_close("logits", routed(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        tokens = [model.generate(input_ids=IDS[:1], max_new_tokens=5, do_sample=False) for model in (routed, plain)]
    assert torch.equal(*tokens)
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (routed, plain)]
    torch.testing.assert_close(*losses, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for loss in losses:
        loss.backward()
    for layer in layers(routed):
        lora = theirs["base_model.model." + layer.path.removeprefix("base_model.model.")]
        assert_close(layer.path, layer.moe_adapter_bank["default"].B.grad[0], lora.lora_B["default"].weight.grad, dtype)


def test_the_border_refuses_half_buffers():
    """Whoever passes a half-width buffer to C++ gets an error, not a broken heap."""
    banks = native.DecodeBanks.of([torch.randn(4, 8, 256)], [torch.randn(4, 8, 256).transpose(1, 2)])
    if banks is None:
        pytest.skip(native.NATIVE.why_not)
    x, ids, weights = torch.randn(1, 256), torch.zeros(1, 2, dtype=torch.int64), torch.rand(1, 2)
    with pytest.raises(KernelError, match="y is bfloat16 on cpu, expected float32 on cpu"):
        banks.add([torch.zeros(1, 256, dtype=torch.bfloat16)], x, ids, weights, 1.0)
