"""Which tensors of a group of projections with experts want a gradient."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Needs:
    """Wanted gradients of n projections with experts."""

    x: bool
    """The input."""
    weights: bool
    """The weights of the pairs."""
    A: tuple[bool, ...]
    """The n down projections."""
    B: tuple[bool, ...]
    """The n up projections."""

    @property
    def hidden(self) -> bool:
        """H is read: by the gradients of the weights and of B only."""
        return self.weights or any(self.B)
