"""Published methods as field values of `RoutedAdapterConfig`.

A preset lists the shared rules that it breaks by its nature, with the reason; the tests check that a listed rule
really fails and that all others hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published method.

    Attributes:
        summary: one line.
        source: paper.
        fields: values of `RoutedAdapterConfig`.
        derive: further values that depend on what the user overrides.
        breaks: rule name -> why this method breaks it by nature.
    """

    summary: str
    source: str
    fields: Mapping[str, Any]
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    breaks: Mapping[str, str] = field(default_factory=dict)

    def values(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Field values of the preset, given what the user set."""
        values = {name: value.copy() if isinstance(value, dict) else value for name, value in self.fields.items()}
        if self.derive is not None:
            values.update(self.derive({**values, **overrides}))
        return values


PRESETS: dict[str, Preset] = {
    "mixture_of_lora": Preset(
        summary="softmax top-k over LoRA experts with the Switch balance loss (what MixLoRA does to a linear)",
        source="arXiv 2404.15159",
        fields={"select": "top_k", "weight": "selected_softmax", "losses": {"switch": 1e-2}},
    ),
    "remix": Preset(
        summary="constant weights, experts sampled without replacement, router trained by leave-one-out rewards",
        source="arXiv 2603.10160",
        fields={"select": "sample_k", "weight": "remix", "scale": 1.0, "detach_router_input": True, "use_rslora": True},
    ),
}


def get_preset(name: str) -> Preset:
    """Look a preset up.

    Args:
        name: name of the preset.

    Raises:
        ConfigError: if there is none of that name; the nearest is suggested.
    """
    if name not in PRESETS:
        from moe_kit.adapters.config import suggestion

        raise ConfigError(f"there is no preset {name!r}.{suggestion(name, list(PRESETS))}")
    return PRESETS[name]
