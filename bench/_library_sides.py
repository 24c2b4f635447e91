"""Adapters of other libraries' kernels for `python -m bench kernels`: each takes our arguments and calls the library as it wants.

| library | entry point | layouts that differ from ours |
|---|---|---|
| scattermoe | `flatten_sort_count`, `parallel_linear` | weights [E, D, O]; gates in the dtype of x; the gated half is ours to apply |
| Liger | `liger_kernel.ops.LigerFusedMoEFunction` | ids int32 and contiguous; gate rows before value rows, like ours |
| SonicMoE | `sonicmoe.moe_general_routing_inputs` | weights [2H, D, E] and [D, H, E] as views of ours, gate rows before value rows by `concat_layout`; flat pairs in token order, int32 |

Sources: shawntan/scattermoe `scattermoe/parallel_experts.py`; linkedin/Liger-Kernel `src/liger_kernel/ops/fused_moe.py`;
Dao-AILab/sonic-moe `sonicmoe/functional/__init__.py` and the call that transformers' `integrations/sonicmoe.py` makes.
None was run on a GPU here: a test calls each adapter against a module with the documented signature, and `check` in
`bench/kernels.py` compares a real library with the loop before anything is timed.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Side = Callable[..., Tensor]
LIBRARIES = {"scattermoe": "scattermoe", "Liger": "liger_kernel.ops", "SonicMoE": "sonicmoe"}
"""Name in the table -> module to import."""


def scattermoe_experts(module, ids: Tensor, E: int) -> Side:
    """Return the SwiGLU block on scattermoe's two scattered products.

    Args:
        module: `scattermoe`.
        ids: [T, K].
        E: Experts.

    Returns:
        Function of x, up [E, 2H, D], down [E, D, H] and weights [T, K].
    """

    def run(x, up, down, weights):
        order = module.flatten_sort_count(ids, num_experts=E)
        z = module.parallel_linear(x, up.transpose(1, 2), ids.shape[1], *order, grouped_out=True)
        gate, value = z.chunk(2, -1)
        gates = weights.to(x.dtype)
        return module.parallel_linear(
            F.silu(gate) * value, down.transpose(1, 2), 1, *order, grouped_in=True, gates=gates
        )

    return run


def scattermoe_lora(module, ids: Tensor, E: int) -> Side:
    """Return routed LoRA experts as scattermoe's mixture of LoRA: an expert block without an activation.

    Args:
        module: `scattermoe`.
        ids: [T, K].
        E: Experts.

    Returns:
        Function of x, A [E, L, D], B [E, O, L] and weights [T, K].
    """

    def run(x, A, B, weights):
        order = module.flatten_sort_count(ids, num_experts=E)
        h = module.parallel_linear(x, A.transpose(1, 2), ids.shape[1], *order, grouped_out=True)
        gates = weights.to(x.dtype)
        return module.parallel_linear(h, B.transpose(1, 2), 1, *order, grouped_in=True, gates=gates)

    return run


def liger_experts(module, ids: Tensor, E: int) -> Side:
    """Return the SwiGLU block as Liger's fused function.

    Args:
        module: `liger_kernel.ops`.
        ids: [T, K].
        E: Experts; Liger reads it from the weights.

    Returns:
        Function of x, up [E, 2H, D], down [E, D, H] and weights [T, K].
    """
    ids32 = ids.to(torch.int32).contiguous()

    def run(x, up, down, weights):
        return module.LigerFusedMoEFunction.apply(x, up, down, ids32, weights)

    return run


def sonic_experts(module, ids: Tensor, E: int) -> Side:
    """Return the SwiGLU block as SonicMoE's entry for a routing made elsewhere.

    Args:
        module: `sonicmoe`.
        ids: [T, K].
        E: Experts.

    Returns:
        Function of x, up [E, 2H, D], down [E, D, H] and weights [T, K].
    """
    activation = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    T, K = ids.shape
    # in token order, which is what the kernel takes for granted
    tokens = torch.arange(T, device=ids.device, dtype=torch.int32).repeat_interleave(K)
    experts = ids.reshape(-1).to(torch.int32)

    def run(x, up, down, weights):
        y, _ = module.moe_general_routing_inputs(
            x,
            weights.reshape(-1),
            tokens,
            experts,
            up.permute(1, 2, 0),
            None,
            down.permute(1, 2, 0),
            None,
            E=E,
            stream_id=torch.cuda.current_stream().cuda_stream if x.is_cuda else None,
            activation_type=activation,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return y

    return run


ADAPTERS: dict[str, dict[str, Callable[..., Side]]] = {
    "experts_mlp": {"scattermoe": scattermoe_experts, "Liger": liger_experts, "SonicMoE": sonic_experts},
    "lora_experts": {"scattermoe": scattermoe_lora},
}
"""Operator -> library -> adapter. Liger and SonicMoE have no routed LoRA experts on a dense base."""


def cannot(library: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    """Say why a library cannot take part, or return None.

    Args:
        library: Name among `LIBRARIES`.
        device: Where the comparison runs.
        dtype: Of the inputs.
        widths: D and the expert width.

    Returns:
        A phrase for the line that names what was left out.
    """
    try:
        importlib.import_module(LIBRARIES[library])
    except ImportError as error:
        return f"not importable ({error})"
    if device.type != "cuda":
        return "its kernels need a GPU"
    if library == "SonicMoE":
        if torch.cuda.get_device_capability(device)[0] < 9:
            return "needs a Hopper GPU or a later one"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if widths[0] % 64 or widths[0] < 512 or widths[1] % 64:
            return "takes widths in multiples of 64, the model's from 512"
    return None


def library_sides(
    operator: str, ids: Tensor, E: int, dtype: torch.dtype, widths: tuple[int, ...]
) -> tuple[dict[str, Side], dict[str, str]]:
    """Return the libraries that can take part, and why the others cannot.

    Args:
        operator: "experts_mlp" or "lora_experts".
        ids: [T, K], on the device of the comparison.
        E: Experts.
        dtype: Of the inputs.
        widths: D and the expert width.

    Returns:
        Name -> side, and name -> reason.
    """
    sides, left_out = {}, {}
    for library, adapter in ADAPTERS[operator].items():
        reason = cannot(library, ids.device, dtype, widths)
        if reason is None:
            sides[library] = adapter(importlib.import_module(LIBRARIES[library]), ids, E)
        else:
            left_out[library] = reason
    return sides, left_out
