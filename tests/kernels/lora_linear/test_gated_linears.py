"""Router, choice and routed linears in one operator equal the three steps, outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from moe_kit_kernels import lora_linear_group
from moe_kit_kernels.lora_experts import cpu_pairs
from moe_kit_kernels.lora_experts.cpu_linears import GatedLinears
from moe_kit_kernels.lora_experts.dispatch import run_gated_linears

from tests.kernels.lora_cases import compare, run
from tests.tolerances import assert_close

SCALE = 1.5


def inputs(n, T=13, E=5, D=7, L=3, widths=(6, 9, 4), dtype=torch.float64):
    made = {"x": torch.randn(T, D, dtype=dtype), "router": torch.randn(E, D, dtype=dtype)}
    for i in range(n):
        made[f"W{i}"] = torch.randn(widths[i], D, dtype=dtype)
        made[f"b{i}"] = torch.randn(widths[i], dtype=dtype)
        made[f"A{i}"] = torch.randn(E, L, D, dtype=dtype)
        # stored as [E, L, O], as a bank has it
        made[f"B{i}"] = torch.randn(E, L, widths[i], dtype=dtype).transpose(1, 2)
    return made


def parts(n, tensors):
    return [[tensors[f"{name}{i}"] for i in range(n)] for name in "WbAB"]


def fused(n, k, how="dense"):
    def call(**tensors):
        weights, biases, A, B = parts(n, tensors)
        logits, _ids, chosen, *ys = GatedLinears.apply(
            how, k, SCALE, tensors["x"], tensors["router"], *weights, *biases, *A, *B
        )
        return (logits, chosen, *ys)

    return call


def plain(n, k):
    """The definition, by autograd and a sum over all experts."""

    def call(**tensors):
        x, (weights, biases, A, B) = tensors["x"], parts(n, tensors)
        logits = x @ tensors["router"].T
        ids = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        chosen = logits.gather(1, ids).softmax(-1)
        dense = torch.zeros_like(logits).scatter(1, ids, chosen)
        ys = []
        for w, bias, a, b in zip(weights, biases, A, B, strict=True):
            hidden = torch.einsum("td,eld->tel", x, a) * dense[..., None]
            ys.append(F.linear(x, w, bias) + SCALE * torch.einsum("tel,eol->to", hidden, b))
        return (logits, chosen, *ys)

    return call


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 2), (2, 5), (3, 2)])
def test_equals_the_three_steps(n, k, poison_empty):
    compare(fused(n, k), plain(n, k), inputs(n))


@pytest.mark.parametrize(("n", "k", "E"), [(1, 1, 5), (2, 2, 3), (3, 2, 40)])
@pytest.mark.parametrize("cached", [64, 1 << 20])
def test_sorted_form_equals_the_three_steps(n, k, E, cached, poison_empty, monkeypatch):
    """Many experts without pairs, and runs of one expert or of all."""
    monkeypatch.setattr(cpu_pairs, "_CACHED_BYTES", cached)
    compare(fused(n, k, "sorted"), plain(n, k), inputs(n, T=21, E=E, D=8, L=4, widths=(8, 4, 12), dtype=torch.float32))


def test_sorted_form_of_dropped_pairs(poison_empty, monkeypatch):
    """Empty slots and ids of no expert count nothing, down to a routing without a single pair."""
    monkeypatch.setattr(cpu_pairs, "_CACHED_BYTES", 64)
    given = inputs(2, T=6, E=5, D=8, L=4, widths=(8, 4), dtype=torch.float32)
    for ids in ([[0, -1], [1, 2], [-1, -1], [3, 9], [1, 0], [2, -1]], [[-1, -1]] * 6):
        table = torch.tensor(ids)

        def call(how, x, chosen, table=table, **rest):
            weights, biases, A, B = parts(2, rest)
            return lora_linear_group(x, weights, biases, A, B, table, chosen, scale=SCALE, backend=how)

        tensors = {**{k: v for k, v in given.items() if k != "router"}, "chosen": torch.rand(6, 2)}
        compare(lambda **t: call("sorted", **t), lambda **t: call("reference", **t), tensors)


@pytest.mark.parametrize("used", [[0], [1], [2], [3], [0, 3], [1, 2]])
def test_any_part_of_the_result_may_go_unused(used):
    """A balance loss reads the logits alone, a sibling's output may be dropped."""

    def some(function):
        return lambda **tensors: tuple(function(**tensors)[i] for i in used)

    given = inputs(2)
    ys, grads = run(some(fused(2, 2)), given)
    expected_ys, expected = run(some(plain(2, 2)), given)
    for y, wanted in zip(ys, expected_ys, strict=True):
        assert_close("y", y, wanted)
    for name, wanted in expected.items():
        zero = torch.zeros_like(given[name])
        assert_close(f"d{name}", zero if grads[name] is None else grads[name], zero if wanted is None else wanted)


@pytest.mark.parametrize("wanted", ["x", "router", "W0", "b0", "A0", "B1"])
def test_only_wanted_gradients(wanted):
    given = inputs(2)
    _, expected = run(plain(2, 2), given)
    leaves = {name: value.detach().clone().requires_grad_(name == wanted) for name, value in given.items()}
    ys = fused(2, 2)(**leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).bfloat16().to(torch.float16).to(y.dtype) for y in ys]
    sum((y * c).sum() for y, c in zip(ys, cotangents, strict=True) if y.requires_grad).backward()
    assert_close(wanted, leaves[wanted].grad, expected[wanted])


def test_ties_go_to_the_lowest_index():
    given = {name: value.float() for name, value in inputs(1).items()}
    given["router"] = torch.ones_like(given["router"]).requires_grad_()
    # whole numbers of sixteenths, whose sums are exact: a library's product may round equal columns differently
    given["x"] = (given["x"].detach() * 16).round() / 16
    weights, biases, A, B = parts(1, given)
    _, ids, chosen, _ = GatedLinears.apply("dense", 2, 1.0, given["x"], given["router"], *weights, *biases, *A, *B)
    assert torch.equal(ids, torch.tensor([[0, 1]]).expand_as(ids))
    assert torch.equal(chosen, torch.full_like(chosen, 0.5))


def test_what_it_keeps():
    """x, the router, weights, ids, H [P, L], the parameters; nothing of the size of a result or of all experts."""
    T, n, E, L = 13, 2, 5, 3
    given = {name: value.requires_grad_() for name, value in inputs(n, T=T, E=E, L=L).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        fused(n, 2)(**given)
    own = {value.untyped_storage().data_ptr() for value in given.values()}
    sizes = sorted(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own)
    assert sizes == sorted([T * 2, T * 2, T * 2 * n * L])


@pytest.mark.parametrize(
    "reason", ["one token without gradients", "half", "autocast", "more experts chosen than there are", "ranks"]
)
def test_refuses_what_it_cannot_do(reason):
    given = inputs(2, T=600, D=32, dtype=torch.float16 if reason == "half" else torch.float32)
    if reason == "ranks":
        given["A1"], given["B1"] = torch.randn(5, 2, 32), torch.randn(5, 9, 2)
    given["router"].requires_grad_()

    def call():
        return run_gated_linears(9 if "chosen" in reason else 2, 1.0, given["x"], given["router"], *parts(2, given))

    if reason == "one token without gradients":
        given = inputs(2, T=1, E=64, D=576, L=8, widths=(576, 576), dtype=torch.float32)
        with torch.no_grad():
            assert call() is None
    elif reason == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert call() is None
    else:
        assert call() is None


@pytest.mark.parametrize("experts", [5, 80], ids=["all at once", "sorted"])
def test_without_gradients_it_gives_the_same(experts):
    given = inputs(2, T=600, D=32, E=experts, dtype=torch.float32)
    given["router"].requires_grad_()

    def call():
        return run_gated_linears(2, 1.0, given["x"], given["router"], *parts(2, given))

    expected = call()
    with torch.no_grad():
        actual = call()
    assert len(actual) == len(expected) == 5
    assert expected[3].requires_grad
    assert not actual[3].requires_grad
    for value, wanted in zip(actual, expected, strict=True):
        assert torch.equal(value, wanted)
