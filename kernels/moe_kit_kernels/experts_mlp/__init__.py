"""Feed-forward experts of a mixture-of-experts block, end to end.

    y_t = sum_k w_tk V_e act(U_e x_t),  e = expert_ids[t, k];   SwiGLU when the first stack holds gate and up

`README.md` has the backward, what is saved, and the cost. Shapes: T tokens, K experts a token, P pairs, E experts,
D width, H expert width, F = 2H when gated, else H.
"""

import torch
from torch import Tensor

from moe_kit_kernels.common.autocast import no_autocast
from moe_kit_kernels.common.checks import check_device, check_float, check_shape, fail
from moe_kit_kernels.experts_mlp import reference
from moe_kit_kernels.experts_mlp.autograd import ExpertsMLP, implementation
from moe_kit_kernels.experts_mlp.call import Call
from moe_kit_kernels.experts_mlp.ops import experts_mlp_op
from moe_kit_kernels.grouped_mm.activations import ACTIVATIONS
from moe_kit_kernels.grouped_mm.backend import grouped_backend
from moe_kit_kernels.route_plan import RoutePlan, check_plan_device, route_plan

__all__ = ["experts_mlp"]


def experts_mlp(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDH: Tensor,
    expert_ids_TK: Tensor | None,
    weights_TK: Tensor,
    *,
    plan: RoutePlan | None = None,
    up_bias_EF: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """Run every token through its experts and sum the weighted results.

    Args:
        x_TD: Tokens `[T, D]`; cast to the dtype of the stacks.
        up_EFD: First stack `[E, F, D]`, any strides. F = 2H makes the experts gated: the gate's rows first, then up's.
        down_EDH: Second stack `[E, D, H]`, any strides.
        expert_ids_TK: Integer ids `[T, K]`; -1 and ids >= E are empty slots. None with a plan of pairs.
        weights_TK: Weight of each slot, `[T, K]`, or `[P]` with a plan of pairs; float32 from a router. Gets a gradient.
        plan: The routing, when the caller has it already (a block's linears share one). Must agree with the ids.
        up_bias_EF: `[E, F]`, optional.
        down_bias_ED: `[E, D]`, optional; weighted like the rest of the expert's result.
        activation: A name in `grouped_mm.activations.ACTIVATIONS`; "silu" with F = 2H is SwiGLU.
        backend: "auto", "native" (C++ on the CPU), "cpu" (plain PyTorch), "triton" or "reference".

    Returns:
        `[T, D]` of x's dtype (autocast's dtype under autocast); the sum over slots is made in at least float32, in slot
        order. Differentiable in x, both stacks, the weights and the biases.

    Raises:
        KernelError: Wrong shapes, dtypes, devices, ids below -1 (seen on the CPU), neither ids nor plan, an unknown
            activation or backend, or a backend that cannot run here.

    Example:
        >>> import torch
        >>> up_EFD, down_EDH = torch.ones(2, 2, 1), torch.ones(2, 1, 1)
        >>> y = experts_mlp(torch.ones(1, 1), up_EFD, down_EDH, torch.tensor([[1]]), torch.tensor([[2.0]]))
        >>> round(y.item(), 4)
        1.4621
    """
    if plan is None:
        if expert_ids_TK is None:
            raise fail("experts_mlp", "the routing", "None", "expert_ids_TK or a plan", "Pass one of them")
        plan = route_plan(expert_ids_TK, up_EFD.shape[0])
    _check(x_TD, up_EFD, down_EDH, plan, weights_TK, up_bias_EF, down_bias_ED, activation)
    dtype = x_TD.dtype
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        up_EFD, down_EDH = up_EFD.to(dtype), down_EDH.to(dtype)
        x_TD = x_TD.to(dtype)
        up_bias_EF = None if up_bias_EF is None else up_bias_EF.to(dtype)
        down_bias_ED = None if down_bias_ED is None else down_bias_ED.to(dtype)
        more = {"up_bias_EF": up_bias_EF, "down_bias_ED": down_bias_ED, "activation": activation, "backend": backend}
        # the gates stay wide, and the sum over a token's rows is made in them
        with no_autocast(x_TD.device):
            return experts_mlp(x_TD, up_EFD, down_EDH, None, weights_TK, plan=plan, **more)
    compute = up_EFD.dtype
    x_TD = x_TD.to(compute)
    up_bias_EF = None if up_bias_EF is None else up_bias_EF.to(compute)
    down_bias_ED = None if down_bias_ED is None else down_bias_ED.to(compute)
    weights_P = weights_TK.reshape(-1)
    floats = x_TD, weights_P, up_bias_EF, down_bias_ED
    name = grouped_backend("experts_mlp", backend, plan.num_pairs, (up_EFD, down_EDH), *floats)
    if name == "reference":
        y_TD = reference.experts_mlp(
            x_TD,
            up_EFD,
            down_EDH,
            plan,
            weights_P,
            up_bias_EF=up_bias_EF,
            down_bias_ED=down_bias_ED,
            activation=activation,
        )
    elif torch.compiler.is_compiling():
        y_TD, _ = experts_mlp_op(
            x_TD,
            up_EFD,
            down_EDH,
            weights_P,
            plan.token_P,
            plan.expert_P,
            up_bias_EF,
            down_bias_ED,
            plan.slots or 0,
            activation,
            backend,
        )
    else:
        call = Call(x_TD, up_EFD, down_EDH, plan, weights_P, up_bias_EF, down_bias_ED, activation)
        if torch.is_grad_enabled():
            y_TD = ExpertsMLP.apply(name, *call)
        else:
            y_TD, _ = implementation(name).forward(call, keep=False)
    return y_TD.to(dtype)


def _check(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDH: Tensor,
    plan: RoutePlan,
    weights_TK: Tensor,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: str,
) -> None:
    check_float("experts_mlp", "x_TD", x_TD, 2)
    check_float("experts_mlp", "up_EFD", up_EFD, 3)
    check_float("experts_mlp", "down_EDH", down_EDH, 3)
    check_float("experts_mlp", "weights_TK", weights_TK, weights_TK.dim())
    E, F, D = up_EFD.shape
    H = down_EDH.shape[2]
    check_shape("experts_mlp", "x_TD", x_TD, (plan.num_tokens, D), "the plan's tokens, last size of up_EFD")
    check_shape("experts_mlp", "up_EFD", up_EFD, (plan.num_experts, None, None), "the plan's num_experts first")
    check_shape("experts_mlp", "down_EDH", down_EDH, (E, D, None), "first and last size of up_EFD")
    if F not in (H, 2 * H):
        raise fail(
            "experts_mlp",
            "F, the middle size of up_EFD,",
            F,
            f"{2 * H} (gated) or {H} (not gated), from down_EDH",
            "Stack gate and up along the middle dimension",
        )
    if weights_TK.numel() != plan.num_pairs:
        got, expected = f"{weights_TK.numel()} values", f"{plan.num_pairs}, one a pair"
        raise fail("experts_mlp", "weights_TK", got, expected, "Pass weights in the shape of the ids")
    if up_bias_EF is not None:
        check_float("experts_mlp", "up_bias_EF", up_bias_EF, 2)
        check_shape("experts_mlp", "up_bias_EF", up_bias_EF, (E, F), "first two sizes of up_EFD")
    if down_bias_ED is not None:
        check_float("experts_mlp", "down_bias_ED", down_bias_ED, 2)
        check_shape("experts_mlp", "down_bias_ED", down_bias_ED, (E, D), "first two sizes of down_EDH")
    if up_EFD.dtype != down_EDH.dtype:
        raise fail(
            "experts_mlp", "dtype of down_EDH", down_EDH.dtype, f"{up_EFD.dtype}, as up_EFD", "Convert one stack"
        )
    if activation not in ACTIVATIONS:
        raise fail("experts_mlp", "activation", repr(activation), f"one of {sorted(ACTIVATIONS)}", "Pass one of them")
    check_device("experts_mlp", x_TD.device, up_EFD=up_EFD, down_EDH=down_EDH, weights_TK=weights_TK)
    check_device("experts_mlp", x_TD.device, up_bias_EF=up_bias_EF, down_bias_ED=down_bias_ED)
    check_plan_device("experts_mlp", x_TD.device, plan)
