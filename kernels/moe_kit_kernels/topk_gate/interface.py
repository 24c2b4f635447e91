"""Public function of top-k gating; the equations are in `reference`.

Legend: T tokens, K slots a token, E experts.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import check_device, check_float, check_shape, fail
from moe_kit_kernels.grouped_mm.backend import resolve_backend
from moe_kit_kernels.topk_gate.cpu import ChosenWeights, stable_topk
from moe_kit_kernels.topk_gate.reference import TopkGate, choice_scores, topk_gate_reference

BACKENDS = ("auto", "dense", "triton", "reference")


def topk_gate(
    logits_TE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    backend: str = "auto",
) -> TopkGate:
    """Choose k experts a token and weigh them.

    Args:
        logits_TE: [T, E] router logits; computed in float32 at least.
        k: experts a token, 1 to E.
        score: "softmax" over all experts, or "sigmoid" of each.
        bias_E: [E] added to the scores for the choice only, never to a weight (loss-free balancing); no gradient.
        num_groups: experts lie in this many equal, consecutive groups.
        top_groups: only the best of the groups may be chosen from; a group is worth the sum of its two best scores.
        renormalize: divide the weights by their sum over the chosen.
        scale: factor on the weights.
        backend: "dense" (few passes of plain PyTorch, hand-written gradient), "triton" (one kernel; no group limit),
            "reference" (the definition), "auto" (Triton on a GPU where it serves, else dense).

    Returns:
        Ids [T, K] best first (equal values to the lowest index), weights [T, K] float32, counts [E].

    Raises:
        KernelError: shapes that do not fit, k, groups, score or backend out of range, or Triton where it cannot run.

    Example:
        >>> gate = topk_gate(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), 2)
        >>> gate.ids_TK.tolist(), gate.weights_TK.tolist(), gate.counts_E.tolist()
        ([[1, 2]], [[0.5, 0.5]], [0, 1, 1, 0])

    Sources: as in `reference`.
    """
    name = "topk_gate"
    check_float(name, "logits_TE", logits_TE, 2)
    E = logits_TE.shape[1]
    if not 1 <= k <= E:
        raise fail(name, "k", k, f"1 to {E}, the number of experts", "Choose no more experts than there are")
    if score not in ("softmax", "sigmoid"):
        raise fail(name, "score", repr(score), '"softmax" or "sigmoid"', "Use one of those")
    if num_groups < 1 or E % num_groups or not 1 <= top_groups <= num_groups or top_groups * (E // num_groups) < k:
        got = f"{top_groups} of {num_groups} groups of {E} experts for k = {k}"
        raise fail(name, "the group limit", got, "equal groups that hold at least k experts", "Keep more groups")
    if backend not in BACKENDS:
        raise fail(name, "backend", repr(backend), f"one of {', '.join(BACKENDS)}", 'Use "auto"')
    if bias_E is not None:
        check_float(name, "bias_E", bias_E, 1)
        check_shape(name, "bias_E", bias_E, (E,), "one number an expert")
        check_device(name, logits_TE.device, bias_E=bias_E)
        bias_E = bias_E.detach()
    if backend == "triton":
        resolve_backend(name, "triton", logits_TE.device)
        if num_groups > 1 or logits_TE.dtype == torch.float64 or torch.compiler.is_compiling():
            got = "with a group limit, float64 logits or torch.compile"
            raise fail(
                name, "backend 'triton'", got, "none of them", 'Use backend="auto", which runs plain PyTorch here'
            )
    # tracing sees plain operations, which the compiler fuses by itself
    if backend == "reference" or torch.compiler.is_compiling():
        return topk_gate_reference(
            logits_TE,
            k,
            score=score,
            bias_E=bias_E,
            num_groups=num_groups,
            top_groups=top_groups,
            renormalize=renormalize,
            scale=scale,
        )
    serves = num_groups == 1 and logits_TE.dtype != torch.float64 and E <= 4096
    if backend == "triton" or (
        backend == "auto" and serves and logits_TE.device.type == "cuda" and find_spec("triton")
    ):
        # Triton is imported by the first call that needs it
        from moe_kit_kernels.topk_gate.triton_autograd import TritonGate

        return TopkGate(*TritonGate.apply(logits_TE, bias_E, k, score, renormalize, float(scale)))
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    ids_TK = stable_topk(choice_scores(logits_TE.detach(), score, bias_E, num_groups, top_groups), k)
    weights_TK = ChosenWeights.apply(logits_TE, ids_TK, score, renormalize, scale)
    flat = ids_TK.view(-1)
    counts_E = torch.zeros(E, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    return TopkGate(ids_TK, weights_TK, counts_E)
