"""Which tensors of a group of linears want a gradient."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Needs:
    """Wanted gradients of n linears with experts."""

    x: bool
    """The input."""
    weights: bool
    """The weights of the pairs."""
    tensors: tuple[bool, ...]
    """n bases, n biases, n A and n B."""

    @property
    def hidden(self) -> bool:
        """H is read: by the gradients of the weights and of B only."""
        return self.weights or any(self.tensors[3 * len(self.tensors) // 4 :])
