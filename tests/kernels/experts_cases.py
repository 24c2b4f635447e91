"""Feed-forward experts for tests: routings, random tensors, the definition one pair at a time, and a comparison of all gradients."""

import torch

from tests.tolerances import assert_close

# name -> (ids [T, K], E); -1 and ids >= E are empty slots
EDGES = {
    "balanced": ([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]], 4),
    "all to one": ([[1], [1], [1], [1], [1], [1], [1]], 3),
    "empty experts": ([[6, 0], [6, 0], [0, 6]], 9),
    "no token": ([], 3),
    "one token": ([[2, 0, 1]], 3),
    "every expert": ([[2, 0, 1], [1, 0, 2]], 3),
    "empty slots": ([[0, -1], [-1, -1], [5, 1], [1, 7]], 2),
    "nothing chosen": ([[-1, -1], [-1, -1]], 2),
    "one expert": ([[0]] * 11, 1),
    "around the swapped GEMM": ([[0]] * 9 + [[1]] * 8 + [[2]] * 48 + [[3]] * 49, 4),
}
GRADIENTS = ("x_TD", "up_EFD", "down_EDH", "weights_TK", "up_bias_EF", "down_bias_ED")


def ids_of(rows):
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)


def case(ids, E, *, D=10, H=7, gated=True, bias=False, dtype=torch.float64):
    F = 2 * H if gated else H
    tensors = {
        "x_TD": torch.randn(ids.shape[0], D),
        "up_EFD": torch.randn(E, F, D) / D**0.5,
        "down_EDH": torch.randn(E, D, H) / H**0.5,
        "weights_TK": torch.rand(ids.shape),
        "up_bias_EF": torch.randn(E, F) if bias else None,
        "down_bias_ED": torch.randn(E, D) if bias else None,
    }
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def naive(ids, t, activation="silu"):
    """One pair at a time, written without any of the package's parts."""
    act = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda z: torch.relu(z) ** 2,
    }[activation]
    E, F, _ = t["up_EFD"].shape
    H = t["down_EDH"].shape[2]
    rows = []
    for i in range(ids.shape[0]):
        row = 0 * t["x_TD"][i]
        for k in range(ids.shape[1]):
            e = int(ids[i, k])
            if not 0 <= e < E:
                continue
            z = t["up_EFD"][e] @ t["x_TD"][i]
            if t["up_bias_EF"] is not None:
                z = z + t["up_bias_EF"][e]
            h = act(z[:H]) * z[H:] if F == 2 * H else act(z)
            y = t["down_EDH"][e] @ h
            if t["down_bias_ED"] is not None:
                y = y + t["down_bias_ED"][e]
            row = row + t["weights_TK"][i, k] * y
        rows.append(row)
    return torch.stack(rows) if rows else 0 * t["x_TD"]


def run(function, tensors, upstream):
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    y = function(leaves)
    if y.requires_grad:
        y.backward(upstream.to(y.dtype))
    return {"y": y, **{name: None if t is None else t.grad for name, t in leaves.items()}}


def compare(actual, expected, tensors, dtype):
    assert_close("y", actual["y"], expected["y"], dtype)
    for name in GRADIENTS:
        if tensors[name] is None:
            continue
        want = torch.zeros_like(tensors[name]) if expected[name] is None else expected[name]
        got = torch.zeros_like(tensors[name]) if actual[name] is None else actual[name]
        assert_close(f"gradient of {name}", got, want, dtype)
