"""Which implementation of LoRA experts serves a call: the kernels' limits, and what the cost model says.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

from functools import lru_cache

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.cost_model import LoraShape, choose_lora, device_of
from moe_kit_kernels.lora_experts.decision import Decision
from moe_kit_kernels.lora_experts.gpu import check_triton, runs_on_kernels, uses_triton
from moe_kit_kernels.route_plan import RoutePlan

# the Triton kernels unroll over a token's slots, so their compile time grows with them, while a GEMM over all experts
# computes less and less in vain
MAX_SLOTS = 8


def on_kernels(decision: Decision, x: Tensor) -> bool:
    """Tell whether the Triton kernels should run a routing.

    Args:
        decision: the routing.
        x: the first input.

    Returns:
        False where they do not run (the CPU, free pairs, float64), for no slot or more than `MAX_SLOTS`, and when every
        expert is chosen, where plain GEMMs compute nothing in vain.
    """
    plan, ids_TK = decision.plan, decision.ids_TK
    if not (uses_triton(x.device) and runs_on_kernels(plan, x)):
        return False
    slots = plan.slots if plan is not None else None if ids_TK is None else ids_TK.shape[-1]
    return slots is not None and 0 < slots <= MAX_SLOTS


def for_kernels(operator: str, T: int, E: int, decision: Decision, x: Tensor) -> Decision:
    """Make a routing one that the Triton kernels run, where they were asked for by name.

    Args:
        operator: public name, for messages.
        T: rows of x.
        E: experts of the bank.
        decision: the routing.
        x: the first input.

    Returns:
        The routing; a table of ids when every expert is chosen.

    Raises:
        KernelError: see `check_kernels`.
    """
    if decision.plan is None and decision.ids_TK is None:
        decision = Decision(torch.arange(E, device=x.device).expand(T, E), decision.weights, None)
    slots = decision.ids_TK.shape[-1] if decision.plan is None else decision.plan.slots
    check_kernels(operator, slots, decision.plan, x)
    return decision


def check_kernels(operator: str, slots: int | None, plan: RoutePlan | None, x: Tensor) -> None:
    """Check that the Triton kernels can run where they were asked for by name.

    Args:
        operator: public name, for messages.
        slots: K, experts a token; None for free pairs.
        plan: the routing, if the caller made a plan.
        x: the first input.

    Raises:
        KernelError: no Triton or no GPU, free pairs, float64, or more than `MAX_SLOTS` slots.
    """
    check_triton(operator, plan, x)
    if slots is not None and slots > MAX_SLOTS:
        got, fix = f"'triton' with {slots} experts a token", 'Pass backend="auto", which runs plain PyTorch here'
        raise fail(operator, "backend", got, f"at most {MAX_SLOTS}", fix)


def of_pairs(decision: Decision) -> bool:
    """Tell whether a routing is a plan of free pairs, which decode, a walk over slots, does not take.

    Args:
        decision: the routing.

    Returns:
        True for free pairs.
    """
    return decision.plan is not None and decision.plan.slots is None


def chosen_form(
    x_TD: Tensor, pairs: int, experts: int, rank: int, width: int, *, training: bool, native: bool = False
) -> str:
    """What "auto" runs for sizes.

    Args:
        x_TD: [T, D] inputs.
        pairs: P.
        experts: E.
        rank: L.
        width: O, of all projections together.
        training: a gradient will be asked for.
        native: compiled code serves the call.

    Returns:
        "dense", "sorted", "decode" or "native".
    """
    (T, D), size = x_TD.shape, x_TD.element_size()
    return choose(T, pairs, experts, rank, D, width, size, training, x_TD.device, native=native)


# at one token the model costs as much as a GEMM; the sizes repeat
@lru_cache(maxsize=1024)
def choose(
    T: int,
    P: int,
    E: int,
    L: int,
    D: int,
    O: int,
    itemsize: int,
    training: bool,
    device: torch.device,
    looked_up: bool = True,
    native: bool = False,
) -> str:
    """Ask the cost model what "auto" runs for sizes; answers are kept.

    Args:
        T: tokens.
        P: pairs.
        E: experts.
        L: rank.
        D: width in.
        O: width out.
        itemsize: bytes of an element of x.
        training: no decode: a gradient will be asked for, or the routing is no table.
        device: where x lives.
        looked_up: see `cost_model.decode_seconds`.
        native: compiled code serves the call.

    Returns:
        "dense", "sorted", "decode" or "native"; on a GPU also "mixed".
    """
    # where every expert has a slot nothing is computed in vain; and a decision that is stored as a full matrix must run as its replay
    # from a table does, bit for bit
    native = native and P < T * E
    shape = LoraShape(tokens=T, pairs=P, experts=E, rank=L, d_in=D, d_out=O, itemsize=itemsize)
    return choose_lora(shape, device_of(device), training=training, looked_up=looked_up, native=native)
