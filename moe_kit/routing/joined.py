r"""Balance over the joined batch of all processes.

A loss of means, `f(sum_r s_r / sum_r n_r)` over processes r with sums s_r of n_r decisions, has the gradient

    df/ds_r = f'(joined mean) / sum_r n_r

at each process's own decisions. So the sums are all-reduced in the forward pass alone, and each process follows its own
part of the gradient. Data-parallel training averages gradients over W processes, hence the factor W on that part: what
comes out is the gradient of one process with the joined batch. Every process must run the same routers in the same
order, as data-parallel training does.

Shapes: G sites, N decisions, E experts, W processes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kit.routing.balance import RoutingStack


@dataclass(frozen=True)
class JoinedStack(RoutingStack):
    """A stack whose means run over the decisions of all processes."""

    @property
    def count(self) -> Tensor:
        """Number of real decisions of all processes, at least 1."""
        return all_sum(self.real_N.sum()).clamp_min(1.0)

    def mean_over_decisions(self, value_GNE: Tensor) -> Tensor:
        """Mean over the real decisions of all processes; [G, N, ...] -> [G, ...]."""
        real = self.real_N.view(1, -1, *([1] * (value_GNE.dim() - 2)))
        return all_sum(torch.where(real > 0, value_GNE, 0.0).sum(1)) / self.count

    def total(self, local: Tensor) -> Tensor:
        """The sum over all processes."""
        return all_sum(local)


def joined(stack: RoutingStack) -> RoutingStack:
    """The same routings seen as a part of the joined batch.

    Args:
        stack: routings of this process.

    Returns:
        A stack with joined means; the stack itself where there is one process.
    """
    if not _several():
        return stack
    return JoinedStack(**{field.name: getattr(stack, field.name) for field in dataclasses.fields(stack)})


def all_sum(local: Tensor) -> Tensor:
    """Sum over all processes, with W times the gradient of the own part.

    Args:
        local: the own part, any shape, the same on every process.

    Returns:
        The sum; `local` itself where there is one process.
    """
    if not _several():
        return local
    total = local.detach().clone()
    torch.distributed.all_reduce(total)
    own = local - local.detach()
    return total + own * torch.distributed.get_world_size()


def all_mean(local: Tensor) -> Tensor:
    """Mean over all processes, without a gradient.

    Args:
        local: any shape, the same on every process.
    """
    return all_sum(local.detach()) / torch.distributed.get_world_size() if _several() else local.detach()


def _several() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
