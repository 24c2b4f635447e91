"""What every operator promises alike: checkpointing, autocast, and errors that say what, got, expected and how to fix it."""

import pytest
import torch
from moe_kit_kernels import (
    KernelError,
    experts_mlp,
    grouped_mm,
    lora_down,
    lora_experts,
    lora_grouped,
    lora_linear,
    lora_up,
    route_plan,
    topk_gate,
)
from moe_kit_kernels.lora_experts import cpu, dispatch
from torch.utils.checkpoint import checkpoint

from tests.tolerances import assert_close

T, K, E, D, O, L = 11, 2, 4, 16, 24, 4
IDS = torch.tensor([[0, 1], [2, -1], [3, 3], [9, 0], [-1, -1], [1, 2], [0, 3], [2, 1], [1, 0], [3, 1], [2, 2]])

# name -> (function of its tensors and a backend, sizes of its differentiable float tensors)
X, W, A, B, GATES = (T, D), (E, O, D), (E, L, D), (E, O, L), (T, K)
OPERATORS = {
    "experts_mlp": (
        lambda x, up, down, w, up_bias, down_bias, backend: experts_mlp(
            x, up, down, IDS, w, up_bias_EF=up_bias, down_bias_ED=down_bias, backend=backend
        ),
        {"x": X, "up": (E, 2 * O, D), "down": (E, D, O), "w": GATES, "up_bias": (E, 2 * O), "down_bias": (E, D)},
    ),
    "grouped_mm": (
        lambda x, weight, w, bias, residual, backend: grouped_mm(
            x,
            weight,
            plan(),
            gather=True,
            activation="silu",
            weights=w,
            bias_EO=bias,
            residual=residual,
            backend=backend,
        ),
        {"x": X, "weight": W, "w": GATES, "bias": (E, O), "residual": (T * K, O)},
    ),
    "grouped_mm, no activation": (
        lambda x, weight, residual, backend: grouped_mm(
            x, weight, plan(), gather=True, scatter=True, residual=residual, backend=backend
        ),
        {"x": X, "weight": W, "residual": (T * K, O)},
    ),
    "lora_experts": (
        lambda x, A, B, w, base, backend: lora_experts(x, A, B, IDS, w, base_TO=base, backend=backend),
        {"x": X, "A": A, "B": B, "w": GATES, "base": (T, O)},
    ),
    "lora_down": (lambda x, A, backend: lora_down(x, A, plan(), backend=backend), {"x": X, "A": A}),
    "lora_up": (
        lambda H, B, w, base, backend: lora_up(H, B, plan(), w, base_TO=base, backend=backend),
        {"H": (T * K, L), "B": B, "w": GATES, "base": (T, O)},
    ),
    "lora_linear": (
        lambda x, weight, bias, A, B, w, backend: lora_linear(x, weight, bias, A, B, IDS, w, backend=backend),
        {"x": X, "weight": (O, D), "bias": (O,), "A": A, "B": B, "w": GATES},
    ),
    "lora_grouped": (
        lambda x, weight, A, B, backend: lora_grouped(x, weight, A, B, plan(), gather=True, backend=backend),
        {"x": X, "weight": W, "A": A, "B": B},
    ),
    "topk_gate": (lambda logits, backend: topk_gate(logits, K, backend=backend).weights_TK, {"logits": (T, E)}),
}
# routing stays in float32 under autocast
IN_FLOAT32 = {"topk_gate"}


def plan():
    return route_plan(IDS, E)


def drawn(name):
    generator = torch.Generator().manual_seed(0)
    _, sizes = OPERATORS[name]
    return {key: (torch.rand(*size, generator=generator) - 0.3) / size[-1] ** 0.5 for key, size in sizes.items()}


def run(function, tensors):
    leaves = {key: value.clone().requires_grad_() for key, value in tensors.items()}
    y = function(**leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream)))


@pytest.mark.parametrize("name", OPERATORS)
def test_checkpointing_changes_nothing(name):
    function, tensors = OPERATORS[name][0], drawn(name)
    y, gradients = run(lambda **t: function(**t, backend="auto"), tensors)
    again, recomputed = run(lambda **t: checkpoint(lambda: function(**t, backend="auto"), use_reentrant=False), tensors)
    assert torch.equal(y, again)
    for key, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[key]), key


@pytest.mark.parametrize("whole_step", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast(name, whole_step):
    function, tensors = OPERATORS[name][0], drawn(name)
    y, gradients = run(lambda **t: function(**t, backend="reference"), tensors)

    def low(**t):
        with torch.autocast("cpu", torch.bfloat16):
            # what a linear layer under autocast hands on
            t = {key: value.bfloat16() if key == "base" else value for key, value in t.items()}
            return function(**t, backend="auto")

    with torch.autocast("cpu", torch.bfloat16, enabled=whole_step):
        actual, low_gradients = run(low, tensors)
    assert actual.dtype is (torch.float32 if name in IN_FLOAT32 else torch.bfloat16)
    assert_close("y", actual.to(y.dtype), y, torch.bfloat16)
    for key, gradient in gradients.items():
        assert low_gradients[key].dtype is torch.float32, "a parameter's gradient has its dtype"
        assert_close(f"d{key}", low_gradients[key], gradient, torch.bfloat16)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_second_derivative_raises(name, checkpointed, monkeypatch):
    """A kernel's gradient has no graph: without the error it would count as a constant."""
    monkeypatch.setattr(dispatch, "_FEW_COLUMNS", 0)
    function, tensors = OPERATORS[name][0], drawn(name)
    leaves = {key: value.requires_grad_() for key, value in tensors.items()}

    def loss():
        call = lambda: function(**leaves, backend="auto")  # noqa: E731
        return (checkpoint(call, use_reentrant=False) if checkpointed else call()).square().sum()

    for key, leaf in leaves.items():
        (gradient,) = torch.autograd.grad(loss(), leaf, create_graph=True)
        # beside another term, as a penalty on the gradient is
        for other in leaves.values():
            with pytest.raises(KernelError, match="first derivatives only"):
                torch.autograd.grad(gradient.square().sum() + other.square().sum(), other, retain_graph=True)
        with pytest.raises(KernelError, match="first derivatives only"):
            (gradient.square().sum() + leaf.square().sum()).backward(retain_graph=True)
        assert not gradient.detach().requires_grad, key


def test_few_columns_have_a_second_derivative():
    x, A, B, w = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 4), (2, 2, 4), (2, 2, 5), (3, 1))
    )
    ids = torch.tensor([[0], [1], [-1]])
    assert torch.autograd.gradgradcheck(lambda x, A, B, w: lora_experts(x, A, B.transpose(1, 2), ids, w), (x, A, B, w))


def test_what_is_kept_between_calls_is_no_inference_tensor():
    with torch.inference_mode():
        kept = cpu.expansion(3, (2,), 0.123, torch.float32, torch.device("cpu"))
    assert not kept.is_inference(), "a later call could not save it for its backward"


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_as_one_graph(name):
    function, tensors = OPERATORS[name][0], drawn(name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **t: function(**t, backend="auto"), fullgraph=True, backend="aot_eager")
    y, gradients = run(compiled, tensors)
    expected, wanted = run(lambda **t: function(**t, backend="reference"), tensors)
    assert_close("y", y, expected)
    for key, gradient in wanted.items():
        assert_close(f"d{key}", gradients[key], gradient)


BAD = {
    "an integer for a float": (lambda t: t.round().long(), "dtype of"),
    "another device": (lambda t: t.to("meta"), "device of"),
    "one row too many in front": (lambda t: torch.cat([t, t[:1]]), "expected"),
    "one column too few": (lambda t: t[..., :-1], "expected"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, (_, sizes) in OPERATORS.items() for key in sizes])
def test_bad_tensors(name, key, bad):
    change, message = BAD[bad]
    if name == "topk_gate" and bad != "an integer for a float":
        pytest.skip("one tensor of any size is all that it takes")
    function, tensors = OPERATORS[name][0], drawn(name)
    tensors[key] = change(tensors[key])
    with pytest.raises(KernelError, match=message) as raised:
        function(**tensors, backend="auto")
    said = str(raised.value)
    assert said.startswith(("lora_", "grouped_mm:", "experts_mlp:", "topk_gate:"))
    # what is wrong, what came, what should have, and an imperative sentence
    assert ", expected " in said
    assert said.endswith(".")
    assert said.rsplit(". ", 1)[1][0].isupper()


@pytest.mark.parametrize("name", OPERATORS)
def test_backends(name):
    function, tensors = OPERATORS[name][0], drawn(name)
    with pytest.raises(KernelError, match="backend is 'fast', expected one of"):
        function(**tensors, backend="fast")
    with pytest.raises(KernelError, match=r"'triton' with tensors on cpu.*which runs \"\w+\" here"):
        function(**tensors, backend="triton")
    assert function(**tensors, backend="auto").shape == function(**tensors, backend="reference").shape


@pytest.mark.parametrize("call", ["route_plan", "experts_mlp", "lora_experts", "lora_linear"])
def test_ids_below_minus_one(call):
    ids, t = IDS.clone(), drawn("lora_linear")
    ids[3, 1] = -2
    mlp = drawn("experts_mlp")
    calls = {
        "route_plan": lambda: route_plan(ids, E),
        "experts_mlp": lambda: experts_mlp(mlp["x"], mlp["up"], mlp["down"], ids, mlp["w"]),
        "lora_experts": lambda: lora_experts(t["x"], t["A"], t["B"], ids, t["w"]),
        "lora_linear": lambda: lora_linear(t["x"], t["weight"], None, t["A"], t["B"], ids, t["w"]),
    }
    with pytest.raises(KernelError, match="-2"):
        calls[call]()
    ids[3, 1] = -1
    calls[call]()
