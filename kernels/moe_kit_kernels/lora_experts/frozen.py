"""How a frozen base weight waits for the backward: outside of the saved tensors, with its version checked.

Hooks on saved tensors (offloading, pinning, compression) treat whatever is saved as an activation; a frozen weight
saved there would be moved once a layer and kept twice. A weight that trains, or is the result of a computation, is
saved as usual.
"""

from torch import Tensor

from moe_kit_kernels.errors import KernelError

Frozen = tuple[Tensor, int] | None


def hold_frozen(weight: Tensor | None, needed: bool) -> tuple[Frozen, Tensor | None]:
    """Decide where a base weight waits.

    Args:
        weight: the base weight, or None.
        needed: whether the backward will read it (the input wants a gradient).

    Returns:
        The pair of weight and version to keep on the context, and the tensor to save; at most one is not None.
    """
    if weight is None or not needed:
        return None, None
    if weight.is_leaf and not weight.requires_grad:
        return (weight, weight._version), None
    return None, weight


def take_weight(frozen: Frozen, trained: Tensor | None) -> Tensor:
    """Take a base weight back from where the forward put it.

    Args:
        frozen: the frozen weight and its version in the forward, or None.
        trained: the weight from the saved tensors, or None.

    Returns:
        The weight [O, D].

    Raises:
        KernelError: a frozen weight was changed in place between forward and backward.
    """
    if frozen is None:
        assert trained is not None
        return trained
    weight, version = frozen
    if weight._version != version:
        raise KernelError(
            f"lora_linear: the frozen weight is at version {weight._version}, expected {version}: it was changed in "
            "place between forward and backward. Change (merge, load) weights outside of a training step."
        )
    return weight
