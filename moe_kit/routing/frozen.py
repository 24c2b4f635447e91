"""Frozen parameters: tensors that belong to a module's function and that no optimizer moves.

Balance biases, thresholds, controllers, fixed projections and experts taken over from elsewhere are such. They are
parameters, since tools that copy, shard or gather a model know its parameters only (a trainer's reference policy,
FSDP, ZeRO), and they never require a gradient. Numbers are kept as vectors of one element: FSDP2 takes no scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class HoldsFrozen(nn.Module):
    """A module with frozen parameters.

    Attributes:
        frozen_names: names of the parameters of this module that nothing trains.
    """

    frozen_names: tuple[str, ...] = ()

    def hold_frozen(self, name: str, value: Tensor) -> None:
        """Register a frozen parameter.

        Args:
            name: its name.
            value: float; its dtype is kept, a scalar becomes a vector of one element.
        """
        self.register_parameter(name, nn.Parameter(torch.atleast_1d(value), requires_grad=False))
        self.frozen_names = (*self.frozen_names, name)

    def train(self, mode: bool = True) -> HoldsFrozen:
        """As for any module; whoever switched all parameters on, frozen ones train no step.

        Args:
            mode: training, or evaluation.
        """
        if mode:
            _freeze(self)
        super().train(mode)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # older files hold scalars, and an action as an integer; with assign=True the file's tensor becomes the parameter
        for name in self.frozen_names:
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor):
                found = found if found.is_floating_point() else found.float()
                state_dict[prefix + name] = torch.atleast_1d(found)
        super()._load_from_state_dict(state_dict, prefix, *args)


def frozen_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Frozen parameters of a module and everything in it.

    Args:
        module: any module.
    """
    return [
        part._parameters[name]
        for part in module.modules()
        if isinstance(part, HoldsFrozen)
        for name in part.frozen_names
        if part._parameters.get(name) is not None
    ]


def trainable_kinds(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module that can be trained, whether they require a gradient now or not.

    Args:
        module: any module.
    """
    frozen = {id(value) for value in frozen_parameters(module)}
    return [value for value in module.parameters() if id(value) not in frozen]


def keep_frozen(module: nn.Module) -> None:
    """Take the gradient off frozen parameters again, after something switched all parameters on.

    Args:
        module: any module.
    """
    for part in module.modules():
        if isinstance(part, HoldsFrozen):
            _freeze(part)


def _freeze(part: HoldsFrozen) -> None:
    for name in part.frozen_names:
        value = part._parameters.get(name)
        if value is not None and value.is_leaf:
            value.requires_grad_(False)


def whole(parameter: Tensor) -> Tensor:
    """The full value of a parameter that may be sharded over processes; every process must call it.

    Args:
        parameter: a parameter.
    """
    value = parameter.detach()
    return value.full_tensor() if _is_sharded(value) else value


def assign(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter, sharded or not, a new value.

    Args:
        parameter: the parameter, changed in place.
        value: of the whole parameter's shape, equal in all processes.
    """
    target: Any = parameter.detach()
    if not _is_sharded(target):
        target.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    # every process holds the whole value, so nothing is sent
    value = value.to(target.dtype).expand(target.shape).contiguous()
    target.copy_(distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None))


def _is_sharded(value: Tensor) -> bool:
    return hasattr(value, "full_tensor")


def is_partitioned(parameter: Tensor) -> bool:
    """Return True if an optimizer of DeepSpeed's ZeRO holds flat partitions of a parameter in its place.

    Args:
        parameter: a parameter; ZeRO-3 marks all of a model, stages 1 and 2 those that are trained.
    """
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_dp_group")


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Make partitioned parameters whole inside the block, and partition what they are then.

    Args:
        parameters: parameters; those of DeepSpeed's ZeRO-3 are gathered, all others stay as they are.
    """
    partitioned = [value for value in parameters if hasattr(value, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    gather: Callable[..., Any] = deepspeed.zero.GatheredParameters
    with gather(partitioned, modifier_rank=0):
        yield
