"""Variants of the gating kernels for the ahead-of-time check."""

from moe_kit_kernels.aot import Variant
from moe_kit_kernels.topk_gate.triton import topk_gate_backward_kernel, topk_gate_kernel
from moe_kit_kernels.topk_gate.triton_autograd import block_rows


def variants(arch: str) -> list[Variant]:
    """Return the variants of both kernels.

    Args:
        arch: architecture; the tiles are the same everywhere.

    Returns:
        8, 128 and (odd) 60 experts, softmax and biased sigmoid.
    """
    return [
        variant
        for E, K, softmax in ((8, 2, True), (128, 8, False), (60, 4, True))
        for variant in (_forward(E, K, softmax), _backward(E, K, softmax))
    ]


def _forward(E: int, K: int, softmax: bool) -> Variant:
    BM, EP = block_rows(E)
    return Variant(
        kernel="topk_gate",
        name=f"{E}-experts",
        function=topk_gate_kernel,
        pointers={
            **{"logits_ptr": "*fp32", "bias_ptr": "*fp32", "ids_ptr": "*i64"},
            **{"weights_ptr": "*fp32", "partial_ptr": "*i64"},
        },
        integers={"T": 16384, "E": E, "stride_t": E},
        floats=("scale", "epsilon"),
        constants={
            **{"K": K, "SOFTMAX": softmax, "BIAS": not softmax, "RENORMALIZE": True},
            **{"BM": BM, "EP": EP, "KP": K},
        },
    )


def _backward(E: int, K: int, softmax: bool) -> Variant:
    BM, EP = block_rows(E)
    return Variant(
        kernel="topk_gate_backward",
        name=f"{E}-experts",
        function=topk_gate_backward_kernel,
        pointers={"logits_ptr": "*fp32", "ids_ptr": "*i64", "dw_ptr": "*fp32", "dlogits_ptr": "*fp32"},
        integers={"T": 16384, "E": E, "stride_t": E},
        floats=("scale", "epsilon"),
        constants={"K": K, "SOFTMAX": softmax, "RENORMALIZE": True, "BM": BM, "EP": EP},
    )
