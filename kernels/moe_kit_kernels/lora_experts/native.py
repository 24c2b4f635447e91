"""Routed LoRA experts in C++ on the CPU, added into results that are there: the `native` form.

Only what was chosen is computed, without a gather: `native.cpp` reads the rows of x and of dy where they lie and adds into those of
y and dx. Kept for the backward: H [P, L] in the plan's given order.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank, n projections.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.common.native import Native, fits, is_plain, is_watched
from moe_kit_kernels.lora_experts.call import Call, Gradients, Needs, finished, started
from moe_kit_kernels.route_plan import RoutePlan

MAX_RANK = 256
"""L at most: a program holds that many numbers for each of four rows."""
# tokens of a block, whose rows stay near a core while all experts pass; more where an expert would have fewer pairs in it than are
# worth reading the expert again (measured at widths of 576 to 4096)
_BLOCK_TOKENS = 256
_BLOCK_PAIRS = 32
# multiplications that are worth waking a second thread for (measured)
_WORK_A_THREAD = 1 << 19
# pairs that native.cpp sorts by itself
_FEW_PAIRS = 128

_ORDER = "token:int32[P] pair:int32[P] start:int32[blocks*E+2]"
_BANK = "x:float32[T*D] A:float32[E*L*D] B:float32[E*O*L]"
_SIZES = (
    f"scale:float T:int64 P:int64<={2**31 - 1} blocks:int64 E:int64 D:int64 O:int64 L:int64<={MAX_RANK} by_rank:int"
)
NATIVE = Native(
    Path(__file__).with_name("native.cpp"),
    moe_kit_order="expert:int64[P] token?:int64[P] by_token?:int64[P] sorted_token:int32[P] sorted_pair:int32[P] "
    f"start:int32[blocks*E+2] P:int64<={2**31 - 1} slots:int64 E:int64 block:int64 blocks:int64",
    moe_kit_lora_forward=f"{_ORDER} {_BANK} weights:float32[P] y:float32[T*O] H?:float32[P*L] {_SIZES} threads:int",
    moe_kit_lora_backward=f"{_ORDER} {_BANK} weights:float32[P] H?:float32[P*L] dy:float32[T*O] dx?:float32[T*D] "
    "dweights?:float32[P] dA?:float32[E*L*D] dB?:float32[E*O*L] G?:float32[P*L] dH?:float32[P*L] "
    f"{_SIZES} add_weights:int threads:int",
    moe_kit_lora_table=f"ids:int64[T*slots] {_BANK} weights:float32[T*slots] y:float32[T*O] scale:float T:int64 slots:int64 "
    f"E:int64 D:int64 O:int64 L:int64<={MAX_RANK} by_rank:int threads:int",
)


def serves(rank: int, *tensors: Tensor | None) -> bool:
    """Tell whether the C++ should run some tensors in eager mode.

    Args:
        rank: L.
        *tensors: the tensors of a call; None is skipped.

    Returns:
        True where it `takes` them, unless a dispatch mode looks on (a FLOP counter, fake tensors), which would see nothing.
    """
    return not is_watched() and takes(rank, *tensors)


def takes(rank: int, *tensors: Tensor | None) -> bool:
    """Tell whether the C++ takes some tensors.

    Args:
        rank: L.
        *tensors: the tensors of a call; None is skipped.

    Returns:
        True for plain float32 tensors on the CPU up to `MAX_RANK`, where the C++ runs.
    """
    return 0 < rank <= MAX_RANK and is_plain(*tensors) and NATIVE.available


def check(operator: str, rank: int, *tensors: Tensor | None) -> None:
    """Check that the C++ can run where it was asked for by name.

    Args:
        operator: public name, for messages.
        rank: L.
        *tensors: the tensors of the call; None is skipped.

    Raises:
        KernelError: it does not take them, or does not run here.
    """
    if takes(rank, *tensors):
        return
    wrong = None if 0 < rank <= MAX_RANK else (f"rank {rank}", f"ranks 1 to {MAX_RANK}")
    raise NATIVE.refusal(operator, wrong, *tensors)


class Order:
    """The pairs of a routing by (block of tokens, expert), for the C++.

    Args:
        plan: the routing, on the CPU.
        threads: threads that will share the blocks.
    """

    def __init__(self, plan: RoutePlan, threads: int) -> None:
        T, P, E = plan.num_tokens, plan.num_pairs, plan.num_experts
        assert T < 2**31, "places are 32 bit"
        largest = max(_BLOCK_TOKENS, _BLOCK_PAIRS * E * T // max(1, P))
        # as many for each thread
        blocks = threads * max(1, -(-T // (largest * threads)))
        block = max(1, -(-T // blocks))
        # tokens, pairs and first places in one allocation
        sizes = (P, P, blocks * E + 2)
        self.places = plan.expert_P.new_empty(sum(sizes), dtype=torch.int32).split(sizes)
        free = None if plan.free_token_P is None else plan.free_token_P.contiguous()
        by_token = None if free is None else plan.token_order_P
        sizes_of = (P, plan.slots or 1, E, block, blocks)
        NATIVE.functions.moe_kit_order(plan.expert_P.contiguous(), free, by_token, *self.places, *sizes_of)
        self.sizes = (T, P, blocks, E)

    @staticmethod
    def of(plan: RoutePlan, threads: int) -> "Order":
        """The order of a plan for a number of threads, computed once."""
        kept = plan.__dict__.setdefault("_native_orders", {})
        if threads not in kept:
            kept[threads] = Order(plan, threads)
        return kept[threads]


def _threads(work: int) -> int:
    """Threads for so many multiplications."""
    return min(torch.get_num_threads(), 1 + work // _WORK_A_THREAD)


def is_few(ids_TK: Tensor) -> bool:
    """Tell whether `add_table` takes a table of ids: few enough pairs to be sorted on the way.

    Args:
        ids_TK: [T, K] ids.
    """
    return ids_TK.numel() <= _FEW_PAIRS


def _as_it_lies(B_EOL: Tensor) -> tuple[Tensor, bool]:
    """B contiguous, and whether as [E, L, O] instead of [E, O, L]: no copy of either."""
    if not B_EOL.is_contiguous() and (b_ELO := B_EOL.transpose(1, 2)).is_contiguous():
        return b_ELO, True
    return B_EOL.contiguous(), False


def add(
    call: Call, bases: Sequence[Tensor | None], *, keep: bool, owned: bool = True
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Add the experts to the results: see `Form.add`. H is n times [P, L]; rows of dropped pairs in it are not written."""
    plan, scale, x_TD, weights, A, B = call
    assert plan is not None
    forward = NATIVE.functions.moe_kit_lora_forward
    x_TD, weights = x_TD.contiguous(), weights.contiguous()
    D, P = x_TD.shape[1], plan.num_pairs
    results, kept = [], []
    for base_TO, a_ELD, b_EOL in zip(bases, A, B, strict=True):
        O, L = b_EOL.shape[1:]
        y_TO = started(base_TO, x_TD, O, owned)
        threads = _threads(P * L * (D + O))
        a_ELD, (b, by_rank) = a_ELD.contiguous(), _as_it_lies(b_EOL)
        H_PL = x_TD.new_empty(P, L) if keep else None
        order = Order.of(plan, threads)
        forward(*order.places, x_TD, a_ELD, b, weights, y_TO, H_PL, scale, *order.sizes, D, O, L, by_rank, threads)
        kept.append(H_PL)
        results.append(finished(y_TO, base_TO, owned))
    return results, tuple(kept) if keep else ()


def add_table(
    operator: str,
    ids_TK: Tensor,
    scale: float,
    x_TD: Tensor,
    weights_TK: Tensor,
    base_TO: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
    *,
    owned: bool,
) -> Tensor:
    """Add one projection's experts for a few tokens without gradients: no plan and no order, one call.

    Args:
        operator: public name, for messages.
        ids_TK: [T, K] integer ids for which `is_few`; -1 and ids >= E are empty slots.
        scale: factor on the sum.
        x_TD: [T, D] inputs.
        weights_TK: [T, K].
        base_TO: result so far [T, O]; None counts as zeros.
        A_ELD: down projections.
        B_EOL: up projections.
        owned: write over the base.

    Returns:
        [T, O].

    Raises:
        KernelError: an id below -1; the base is as it was then.
    """
    (T, K), (E, O, L) = ids_TK.shape, B_EOL.shape
    ids_TK, x_TD, weights_TK = ids_TK.to(torch.int64).contiguous(), x_TD.contiguous(), weights_TK.contiguous()
    y_TO = started(base_TO, x_TD, O, owned)
    a_ELD, (b, by_rank) = A_ELD.contiguous(), _as_it_lies(B_EOL)
    D = x_TD.shape[1]
    threads = min(max(1, T), _threads(T * K * L * (D + O)))
    tensors = (ids_TK, x_TD, a_ELD, b, weights_TK, y_TO)
    lowest = NATIVE.functions.moe_kit_lora_table(*tensors, scale, T, K, E, D, O, L, by_rank, threads)
    if lowest < -1:
        raise fail(operator, "the smallest expert id", lowest, "-1 or more", "Mark empty slots with -1")
    return finished(y_TO, base_TO, owned)


class DecodeBanks:
    """Banks of linears over one input of a few tokens, looked up once and applied many times without gradients.

    Args:
        A: down projections [E, L_i, D], contiguous.
        B: up projections [E, O_i, L_i], contiguous or kept as [E, L_i, O_i].
    """

    def __init__(self, A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
        self.function = NATIVE.functions.moe_kit_lora_table
        self.banks = []
        for a, b_EOL in zip(A, B, strict=True):
            # views that nobody else holds, so that none is resized once it was checked
            b, by_rank = _as_it_lies(b_EOL.detach())
            self.banks.append((a.detach(), b, (a.shape[0], a.shape[2], *b_EOL.shape[1:], int(by_rank), 1)))
        self.width_in = A[0].shape[2]
        self.checked = all(
            self.width_in == D
            and L <= MAX_RANK
            and fits(a, torch.float32, E * L * D)
            and fits(b, torch.float32, E * O * L)
            for a, b, (E, D, O, L, *_) in self.banks
        )

    @staticmethod
    def of(A: Sequence[Tensor], B: Sequence[Tensor]) -> "DecodeBanks | None":
        """The banks, or None where the C++ does not take them as they lie.

        Args:
            A: down projections [E, L_i, D].
            B: up projections [E, O_i, L_i].
        """
        # a copy would not follow what is written to the bank
        lies = all(t.is_contiguous() for t in A) and all(_as_it_lies(t)[0].data_ptr() == t.data_ptr() for t in B)
        return DecodeBanks(A, B) if lies and all(takes(a.shape[1], a, b) for a, b in zip(A, B, strict=True)) else None

    @staticmethod
    def take(ids_TK: Tensor, weights_TK: Tensor) -> bool:
        """Tell whether a routing can be applied.

        Args:
            ids_TK: [T, K] int64.
            weights_TK: [T, K].

        Returns:
            True for float32 weights of a few pairs; False while a dispatch mode looks on, which would see nothing.
        """
        return is_few(ids_TK) and weights_TK.dtype is torch.float32 and not is_watched()

    def add(self, results: Sequence[Tensor], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, scale: float) -> None:
        """Add the experts of all linears to their results.

        Args:
            results: results so far [T, O_i], contiguous float32, written over.
            x_TD: [T, D] contiguous float32.
            ids_TK: [T, K] int64 that `take` let pass; -1 and ids >= E are empty slots.
            weights_TK: [T, K] float32.
            scale: factor on the sums.

        Raises:
            KernelError: a tensor is not as described.
        """
        ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
        T, K = ids_TK.shape
        # this runs for every decoded token: what all linears share is checked once, and the banks were checked before
        shared = (
            self.checked
            and fits(ids_TK, torch.int64, T * K)
            and fits(x_TD, torch.float32, T * self.width_in)
            and fits(weights_TK, torch.float32, T * K)
            and not torch.autograd._profiler_enabled()
        )
        # the memory of what does not fit is not asked for
        ids, x, weights = (t.data_ptr() if shared else 0 for t in (ids_TK, x_TD, weights_TK))
        for y_TO, (a, b, sizes) in zip(results, self.banks, strict=True):
            if shared and fits(y_TO, torch.float32, T * sizes[2]):
                addresses = (ids, x, a.data_ptr(), b.data_ptr(), weights, y_TO.data_ptr())
                self.function.entry(*addresses, scale, T, K, *sizes)
            else:
                # refused there with a reason, or named to the profiler
                self.function(ids_TK, x_TD, a, b, weights_TK, y_TO, scale, T, K, *sizes)


def gradients(call: Call, needs: Needs, kept: Sequence[Tensor], dys: Sequence[Tensor], dx: Tensor | None) -> Gradients:
    """Compute the gradients that are asked for: see `Form.gradients`."""
    plan, scale, x_TD, weights, A, B = call
    assert plan is not None
    backward = NATIVE.functions.moe_kit_lora_backward
    x_TD, weights = x_TD.contiguous(), weights.contiguous()
    n, P, D = len(dys), plan.num_pairs, x_TD.shape[1]
    dx = torch.zeros_like(x_TD) if dx is None and needs.x else dx
    dweights = torch.zeros_like(weights) if needs.weights else None
    dA: list[Tensor | None] = [None] * n
    dB: list[Tensor | None] = [None] * n
    for i, (dy_TO, a_ELD, b_EOL) in enumerate(zip(dys, A, B, strict=True)):
        dy_TO, a_ELD, (b, by_rank) = dy_TO.contiguous(), a_ELD.contiguous(), _as_it_lies(b_EOL)
        O, L = b_EOL.shape[1:]
        threads = _threads(3 * P * L * (D + O))
        dA[i] = torch.empty_like(a_ELD) if needs.A[i] else None
        db = torch.empty_like(b) if needs.B[i] else None
        G_PL = dy_TO.new_empty(P, L) if needs.B[i] else None
        dH_PL = dy_TO.new_empty(P, L) if needs.x or needs.A[i] else None
        order = Order.of(plan, threads)
        backward(
            *order.places,
            x_TD,
            a_ELD,
            b,
            weights,
            kept[i] if kept else None,
            dy_TO,
            dx if needs.x else None,
            dweights,
            dA[i],
            db,
            G_PL,
            dH_PL,
            scale,
            *order.sizes,
            D,
            O,
            L,
            by_rank,
            i > 0,
            threads,
        )
        dB[i] = db.transpose(1, 2) if by_rank and db is not None else db
    return dx if needs.x else None, dweights, dA, dB
