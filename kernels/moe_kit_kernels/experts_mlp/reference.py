"""Naive feed-forward experts, one expert at a time: the definition the other implementations must equal.

    z_p = x_{t(p)} U_{e(p)}^T + b;   h_p = act(z_p) or act(z_p[:H]) * z_p[H:];   y_t = sum_{p of t} w_p (h_p V_{e(p)}^T + c)

Shapes: T tokens, P pairs, E experts, D width, F pre-activation width (2H when gated, else H).
"""

import torch
from torch import Tensor

from moe_kit_kernels.grouped_mm.activations import activate
from moe_kit_kernels.route_plan import RoutePlan


def experts_mlp(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDH: Tensor,
    plan: RoutePlan,
    weights_P: Tensor,
    *,
    up_bias_EF: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Return `[T, D]` of x's dtype; the sum over a token's pairs is made in at least float32.

    Same arguments as the public `experts_mlp`, which documents them, with the routing as a plan and flat weights.
    """
    gated = up_EFD.shape[1] == 2 * down_EDH.shape[2]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    for e in range(plan.num_experts):
        pair_n = (plan.expert_P == e).nonzero().squeeze(1)
        token_n = plan.token_P[pair_n]
        z_nF = x_TD[token_n] @ up_EFD[e].t()
        if up_bias_EF is not None:
            z_nF = z_nF + up_bias_EF[e]
        y_nD = activate(z_nF, activation, gated) @ down_EDH[e].t()
        if down_bias_ED is not None:
            y_nD = y_nD + down_bias_ED[e]
        y_TD = y_TD.index_add(0, token_n, weights_P[pair_n, None].to(wide) * y_nD.to(wide))
    return y_TD.to(x_TD.dtype)
