"""Activations that the expert operators fuse, each with its derivative written out.

A gated activation acts on pre-activations of width F = 2H, the gate's half first: `h = act(z[:, :H]) * z[:, H:]`
(SwiGLU with act = silu, arXiv 2002.05202). An ungated one has F = H: `h = act(z)`.

Models with another rule (interleaved halves, clamps) pass through the two grouped GEMMs one by one instead.
Shapes: n rows, F pre-activation width, H activation width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


# name -> (act(z), gradient of z from the gradient of act(z))
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, lambda dh, z: _aten.silu_backward(dh, z)),
    "gelu": (F.gelu, lambda dh, z: _aten.gelu_backward(dh, z)),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dh, z: _aten.gelu_backward(dh, z, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dh, z: dh * (z > 0)),
    # squared ReLU (arXiv 2109.08668)
    "relu2": (lambda z: F.relu(z).square(), lambda dh, z: dh * F.relu(z).mul_(2)),
}


def activate(z_nF: Tensor, activation: str, gated: bool) -> Tensor:
    """Return `act(z)`, or `act(gate half) * other half`: `[n, H]`. Plain autograd can follow it."""
    act = ACTIVATIONS[activation][0]
    if not gated:
        return act(z_nF)
    gate_nH, up_nH = z_nF.chunk(2, dim=-1)
    return act(gate_nH) * up_nH


def activate_(z_nF: Tensor, activation: str, gated: bool) -> Tensor:
    """Return the same as `activate` with one temporary less; `z_nF` may be overwritten. Not differentiable."""
    if activation != "silu":
        return activate(z_nF, activation, gated)
    if not gated:
        return F.silu(z_nF, inplace=True)
    gate_nH, up_nH = z_nF.chunk(2, dim=-1)
    return F.silu(gate_nH).mul_(up_nH)


def activate_backward(dh_nH: Tensor, z_nF: Tensor, activation: str, gated: bool, out: Tensor) -> Tensor:
    """Write the gradient of `z_nF` to `out` from the gradient of `activate(z_nF)`, and return the activation again.

    Args:
        dh_nH: Gradient of the activation.
        z_nF: Saved pre-activations.
        activation: Name in `ACTIVATIONS`.
        gated: Whether z holds two halves.
        out: `[n, F]`, written.

    Returns:
        `activate(z_nF)`, `[n, H]`: cheaper to make again here than to keep from the forward.
    """
    act, act_backward = ACTIVATIONS[activation]
    if not gated:
        out.copy_(act_backward(dh_nH, z_nF))
        return act(z_nF)
    gate_nH, up_nH = z_nF.chunk(2, dim=-1)
    H = gate_nH.shape[-1]
    a_nH = act(gate_nH)
    torch.mul(dh_nH, a_nH, out=out[:, H:])
    if activation == "silu":
        _aten.silu_backward.grad_input(dh_nH * up_nH, gate_nH, grad_input=out[:, :H])
    else:
        out[:, :H].copy_(act_backward(dh_nH * up_nH, gate_nH))
    return a_nH.mul_(up_nH)
