"""`FrozenStateLayer`: PEFT's tuner layer whose frozen parameters stay frozen whatever PEFT switches on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from moe_kit.routing.frozen import keep_frozen


class FrozenStateLayer(BaseTunerLayer):
    """A tuner layer with parameters that nothing trains (see `moe_kit.routing.frozen`).

    PEFT gives all parameters of an active adapter a gradient.
    """

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, as PEFT does.

        Args:
            adapter_names: their names.
            inference_mode: without gradients.
        """
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters on or off, as PEFT does.

        Args:
            adapter_names: their names.
            requires_grad: on or off.
        """
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for name in self.adapter_layer_names:
            container: Any = getattr(self, name)
            keep_frozen(container)
