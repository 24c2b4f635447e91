"""What `python -m bench kernels` compares: our operators and the peers of the same mathematics, on drawn inputs."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from moe_kit_kernels import KernelError, experts_mlp, lora_experts
from moe_kit_kernels.roofline import lora_designs, mlp_designs
from torch import Tensor
from torch.nn import functional as F

from bench._library_sides import library_sides

COPY_LIMIT_BYTES = 1e9
"""transformers' batched_mm copies the weights of every pair; it takes part below this."""
MASKED_EXPERTS = 16
"""The masked GEMMs of full-size experts cost E / K times the work; they take part up to this many experts."""


@dataclass(frozen=True)
class Sides:
    """One comparison: functions of the same inputs, and the work that they must do."""

    functions: dict[str, Callable[..., Tensor]]
    """Name -> function of the inputs; the last one, a loop over experts, is what the others are checked against."""
    inputs: list[Tensor]
    """Differentiable inputs."""
    flops: float
    """Useful FLOPs of a forward."""
    forward_bytes: float
    """Least bytes that a forward moves."""
    backward_bytes: float
    """Least bytes that a backward moves."""
    left_out: dict[str, str]
    """Library -> why it does not take part."""


def minimal_bytes(designs: Sequence[dict], itemsize: int) -> tuple[float, float]:
    """Return the least bytes of forward and backward; the roofline counts elements of two bytes."""
    forward, backward = (found["minimum"][0].hbm_bytes * itemsize / 2 for found in designs)
    return forward, backward


def peers(operator: str, names: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """Import the peers that the user named.

    Args:
        operator: "experts_mlp" or "lora_experts".
        names: "operator=module:function"; the function takes what the operator's other sides take.

    Returns:
        "module:function" -> function, for this operator.

    Raises:
        KernelError: A name that is not of that form, or cannot be imported.
    """
    found = {}
    for text in names:
        target, _, path = text.partition("=")
        module, _, function = path.partition(":")
        if not function:
            raise KernelError(f"bench kernels: --peer got {text!r}; expected operator=module:function. Correct it.")
        if target == operator:
            try:
                found[path] = getattr(importlib.import_module(module), function)
            except (ImportError, AttributeError) as error:
                raise KernelError(f"bench kernels: --peer {text!r} cannot be imported: {error}. Install it.") from error
    return found


def transformers_sides(ids: Tensor, E: int, D: int, H: int, itemsize: int) -> dict[str, Callable[..., Tensor]]:
    """Return transformers' expert implementations on the layer of Qwen3-MoE; empty where it cannot be imported."""
    try:
        from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return {}
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=H, num_experts=E, hidden_act="silu")
    config._experts_implementation = "eager"
    with torch.device("meta"):
        layer = Qwen3MoeExperts(config)
    # our leaves take the place of its parameters
    del layer.gate_up_proj, layer.down_proj

    def side(forward: Callable) -> Callable[..., Tensor]:
        def run(x, up, down, weights):
            layer.gate_up_proj, layer.down_proj = up, down
            return forward(layer, x, ids, weights.to(x.dtype))

        return run

    found = {"transformers eager": side(Qwen3MoeExperts.forward.__wrapped__)}
    found["transformers grouped_mm"] = side(grouped_mm_experts_forward)
    if ids.numel() * 3 * D * H * itemsize < COPY_LIMIT_BYTES:
        found["transformers batched_mm"] = side(batched_mm_experts_forward)
    return found


def draw_ids(load: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """Return ids `[T, K]` of a load.

    Args:
        load: "uniform"; "zipf" (probability of expert i falls as 1 / (i + 1)^1.5); "one" (all tokens to the same
            experts); or a file with saved ids, `[T, K]` by `torch.save`.
        tokens: T.
        experts: E.
        top_k: K.

    Returns:
        int64 ids, K distinct experts a token.

    Raises:
        KernelError: There is no such file, or its ids are of another shape or of experts that are not there.
    """
    if load == "uniform":
        return torch.rand(tokens, experts).topk(top_k).indices
    if load == "zipf":
        p_E = 1.0 / torch.arange(1, experts + 1).float() ** 1.5
        # the largest of log p + Gumbel noise draws without replacement
        return (p_E.log() - torch.empty(tokens, experts).exponential_().log()).topk(top_k).indices
    if load == "one":
        return torch.arange(top_k).expand(tokens, top_k).contiguous()
    if not Path(load).is_file():
        raise KernelError(
            f"bench kernels: --load got {load!r}; expected uniform, zipf, one or a file. Correct the name."
        )
    ids = torch.load(load, weights_only=True)[:tokens].long()
    if ids.shape != (tokens, top_k) or int(ids.min()) < 0 or int(ids.max()) >= experts:
        got = f"{list(ids.shape)}, ids {int(ids.min())} to {int(ids.max())}" if ids.numel() else "no ids"
        raise KernelError(
            f"bench kernels: --load {load} holds {got}; expected [{tokens}, {top_k}], ids 0 to {experts - 1}. "
            "Pass the file's --tokens, --top-k and --experts."
        )
    return ids


def experts_sides(options: argparse.Namespace, ids: Tensor) -> Sides:
    """Return the sides of `experts_mlp`, their differentiable inputs and the work of a call."""
    T, E, D, H = options.tokens, options.experts, options.d_in, options.d_out
    dtype, device = getattr(torch, options.dtype), ids.device
    x = torch.randn(T, D, dtype=dtype, device=device)
    up = torch.randn(E, 2 * H, D, dtype=dtype, device=device) / D**0.5
    down = torch.randn(E, D, H, dtype=dtype, device=device) / H**0.5
    weights = torch.rand(ids.shape, device=device)

    def loop(x, up, down, weights):
        y = torch.zeros_like(x, dtype=torch.float32)
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            gate, value = F.linear(x[token], up[e]).chunk(2, -1)
            part = F.linear(F.silu(gate) * value, down[e]) * weights[token, slot, None]
            y = y.index_add(0, token, part.float())
        return y.to(x.dtype)

    def grouped(x, up, down, weights):
        expert, order = ids.reshape(-1).sort(stable=True)
        ends = (
            torch.zeros(E, dtype=torch.int64, device=device).scatter_add_(0, expert, torch.ones_like(expert)).cumsum(0)
        )
        rows = x[order // ids.shape[1]]
        gate, value = F.grouped_mm(rows, up.transpose(1, 2), offs=ends.int()).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=ends.int())
        out = out * weights.reshape(-1)[order, None].to(out.dtype)
        return out[order.argsort()].view(T, ids.shape[1], D).sum(1)

    def masked(x, up, down, weights):
        # every expert over all tokens, its gate zero where it was not chosen
        gates = torch.zeros(T, E, device=device).scatter_add(1, ids, weights)
        y = torch.zeros_like(x, dtype=torch.float32)
        for e in range(E):
            gate, value = F.linear(x, up[e]).chunk(2, -1)
            y = y + F.linear(F.silu(gate) * value, down[e]).float() * gates[:, e, None]
        return y.to(x.dtype)

    sides = {"moe_kit": lambda x, up, down, w: experts_mlp(x, up, down, ids, w), "torch grouped_mm": grouped}
    sides |= transformers_sides(ids, E, D, H, x.element_size())
    if E <= MASKED_EXPERTS:
        sides["masked GEMMs"] = masked
    others, left_out = library_sides("experts_mlp", ids, E, dtype, (D, H))
    sides |= others
    for name, peer in peers("experts_mlp", options.peer).items():
        sides[name] = lambda x, up, down, w, peer=peer: peer(x, up, down, ids, w)
    sides["loop"] = loop
    least = mlp_designs(T, ids.shape[1], E, D, H), mlp_designs(T, ids.shape[1], E, D, H, backward=True)
    moved = minimal_bytes(least, x.element_size())
    return Sides(sides, [x, up, down, weights], 6.0 * ids.numel() * D * H, *moved, left_out)


def lora_sides(options: argparse.Namespace, ids: Tensor) -> Sides:
    """Return the sides of `lora_experts`, their differentiable inputs and the work of a call."""
    T, E, D, O, L = options.tokens, options.experts, options.d_in, options.d_out, options.rank
    dtype, device = getattr(torch, options.dtype), ids.device
    x = torch.randn(T, D, dtype=dtype, device=device)
    A = torch.randn(E, L, D, dtype=dtype, device=device) / D**0.5
    B = torch.randn(E, O, L, dtype=dtype, device=device) / L**0.5
    weights = torch.rand(ids.shape, device=device)

    def masked(x, A, B, weights):
        gates = torch.zeros(T, E, dtype=weights.dtype, device=device).scatter_add(1, ids, weights).to(x.dtype)
        h = F.linear(x, A.reshape(E * L, D)).view(T, E, L) * gates[..., None]
        return h.reshape(T, E * L) @ B.transpose(1, 2).reshape(E * L, O)

    def loop(x, A, B, weights):
        y = torch.zeros(T, O, dtype=torch.float32, device=device)
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            part = F.linear(F.linear(x[token], A[e]), B[e]) * weights[token, slot, None]
            y = y.index_add(0, token, part.float())
        return y.to(x.dtype)

    def grouped(x, A, B, weights):
        expert, order = ids.reshape(-1).sort(stable=True)
        ends = torch.bincount(expert, minlength=E).cumsum(0).int()
        h = F.grouped_mm(x[order // ids.shape[1]], A.transpose(1, 2), offs=ends)
        out = F.grouped_mm(h, B.transpose(1, 2), offs=ends)
        out = out * weights.reshape(-1)[order, None].to(out.dtype)
        return out[order.argsort()].view(T, ids.shape[1], O).sum(1)

    sides = {"moe_kit": lambda x, A, B, w: lora_experts(x, A, B, ids, w), "masked GEMM pair": masked}
    # its rows must be whole 16-byte steps
    if L * x.element_size() % 16 == 0:
        sides["torch grouped_mm"] = grouped
    others, left_out = library_sides("lora_experts", ids, E, dtype, (D, O))
    sides |= others
    for name, peer in peers("lora_experts", options.peer).items():
        sides[name] = lambda x, A, B, w, peer=peer: peer(x, A, B, ids, w)
    sides["loop"] = loop
    least = lora_designs(T, ids.shape[1], E, L, D, O), lora_designs(T, ids.shape[1], E, L, D, O, backward=True)
    work = 2.0 * ids.numel() * L * (D + O)
    return Sides(sides, [x, A, B, weights], work, *minimal_bytes(least, x.element_size()), left_out)


BUILD = {"experts_mlp": experts_sides, "lora_experts": lora_sides}
"""Operator -> builder of its comparison."""
