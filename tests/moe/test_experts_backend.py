import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from moe_kit.moe import experts_backend
from tests.tiny import MOE_FAMILIES, tiny_moe, tiny_moe_config
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def _registered():
    experts_backend.register()


def build(name, dtype=torch.float32):
    return tiny_moe(name).to(dtype)


def run(model, implementation, ids):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(ids).logits
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_equals_eager(name):
    model = build(name)
    ids = torch.randint(3, 64, (2, 9))
    expected, expected_grads = run(model, "eager", ids)
    logits, grads = run(model, "moe_kit", ids)
    assert_close("logits", logits, expected)
    checked = 0
    for parameter, gradient in expected_grads.items():
        if gradient is None:
            assert grads[parameter] is None, parameter
            continue
        assert_close(f"gradient of {parameter}", grads[parameter], gradient)
        checked += "experts" in parameter
    assert checked >= 2
    model.eval()
    sequences = []
    for implementation in ("eager", "moe_kit"):
        model.set_experts_implementation(implementation)
        sequences.append(model.generate(ids, max_new_tokens=6, do_sample=False))
    assert torch.equal(*sequences)


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_half_precision(name):
    model = build(name, torch.bfloat16).eval()
    ids = torch.randint(3, 64, (2, 9))
    logits = {}
    for implementation in ("eager", "moe_kit"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(ids).logits
    assert logits["moe_kit"].dtype is torch.bfloat16
    assert_close("logits", logits["moe_kit"], logits["eager"])


def test_from_config_and_checkpointing():
    config = tiny_moe_config("Qwen3Moe")
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moe_kit")
    assert model.config._experts_implementation == "moe_kit"
    ids = torch.randint(3, 64, (2, 9))
    _, expected = run(model, "moe_kit", ids)
    expected = {name: g.clone() for name, g in expected.items() if g is not None}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    _, grads = run(model, "moe_kit", ids)
    for name, gradient in expected.items():
        assert_close(name, grads[name], gradient)


class _Config:
    _experts_implementation = "eager"


def experts_class(*, transposed, biased, gated, norm, act):
    """An experts module with an eager forward written here, marked the way transformers marks its own."""
    E, D, H = 5, 12, 8
    F = 2 * H if gated else H

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            up, down = ((D, F), (H, D)) if transposed else ((F, D), (D, H))
            name = "gate_up_proj" if gated else "up_proj"
            setattr(self, name, nn.Parameter(torch.randn(E, *up) * 0.3))
            self.down_proj = nn.Parameter(torch.randn(E, *down) * 0.3)
            if biased:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, F)))
                self.down_proj_bias = nn.Parameter(torch.randn(E, D))
            self.act_fn = act
            if norm:
                self.post_expert_norm = nn.LayerNorm(D)
                nn.init.normal_(self.post_expert_norm.bias)

        def forward(self, x, ids, weights):
            name = "gate_up_proj" if gated else "up_proj"
            y = torch.zeros_like(x)
            for t in range(x.shape[0]):
                for k in range(ids.shape[1]):
                    e = int(ids[t, k])
                    if e >= E:
                        continue
                    up, down = getattr(self, name)[e], self.down_proj[e]
                    z = x[t] @ up if transposed else up @ x[t]
                    z = z + getattr(self, f"{name}_bias")[e] if biased else z
                    h = self.act_fn(z[:H]) * z[H:] if gated else self.act_fn(z)
                    o = h @ down if transposed else down @ h
                    o = o + self.down_proj_bias[e] if biased else o
                    o = self.post_expert_norm(o) if norm else o
                    y = y + torch.nn.functional.one_hot(torch.tensor(t), x.shape[0])[:, None] * weights[t, k] * o
            return y

    return use_experts_implementation(
        Experts, is_transposed=transposed, has_bias=biased, has_gate=gated, has_post_expert_norm=norm
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.Tanh()], ids=lambda a: type(a).__name__)
def test_every_layout_with_sentinels(transposed, biased, gated, norm, act):
    module = experts_class(transposed=transposed, biased=biased, gated=gated, norm=norm, act=act)(_Config())
    module._is_expert_parallel = True
    x = torch.randn(6, 12, requires_grad=True)
    # 5 is the sentinel of another rank's expert
    ids = torch.tensor([[0, 5], [1, 4], [5, 5], [4, 0], [3, 5], [0, 1]])
    weights = torch.rand(6, 2).masked_fill(ids == 5, 0.0).requires_grad_()
    results = {}
    for implementation in ("eager", "moe_kit"):
        module.config = type("C", (), {"_experts_implementation": implementation})
        y = module(x, ids, weights)
        leaves = [x, weights, *module.parameters()]
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results[implementation] = [y, *grads]
    for actual, expected in zip(results["moe_kit"], results["eager"]):
        assert_close("tensor", actual, expected)
    assert not results["moe_kit"][2][ids == 5].any()


def test_misrouting_is_noticed():
    module = experts_class(transposed=False, biased=False, gated=True, norm=False, act=nn.SiLU())(_Config())
    x, ids, weights = torch.randn(6, 12), torch.randint(0, 5, (6, 2)), torch.rand(6, 2)
    expected = module(x, ids, weights)
    with pytest.raises(AssertionError, match="error ratio"):
        assert_close("y", experts_backend.experts_forward(module, x, (ids + 1) % 5, weights), expected)


def test_registering_loads_no_kernel():
    code = (
        "import sys; from moe_kit.moe import experts_backend; experts_backend.register();"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS;"
        "assert 'moe_kit' in ALL_EXPERTS_FUNCTIONS.valid_keys();"
        "loaded = {m.split('.')[1] for m in sys.modules if m.startswith('moe_kit_kernels.')};"
        "assert not loaded & {'grouped_mm', 'experts_mlp', 'route_plan', 'lora_experts', 'tuning'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_experts_compile_as_one_graph(name):
    model = build(name)
    experts = next(m for n, m in model.named_modules() if n.endswith("mlp.experts"))
    x, weights = torch.randn(7, 32), torch.rand(7, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    expected = experts_backend.experts_forward(experts, x, ids, weights)
    compiled = torch.compile(experts_backend.experts_forward, fullgraph=True, backend="aot_eager")
    assert_close("y", compiled(experts, x, ids, weights), expected)
