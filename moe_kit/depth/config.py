"""`LayerRoutingConfig`: the PEFT configuration of layer routers.

A layer router decides, for each sequence or each token, what happens to a unit (a decoder layer, its attention or its
MLP): 0 skip, 1 execute, 2 repeat, 3 approximate. Fields are plain JSON; a preset is a set of values with a source.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft.config import PeftConfig

from moe_kit.errors import ConfigError
from moe_kit.hf.fields import names_unknown_fields, suggestion
from moe_kit.hf.model_card import complete_card
from moe_kit.hf.registration import add_peft_type

PEFT_TYPE = add_peft_type("MOE_DEPTH")

SKIP, EXECUTE, REPEAT, APPROXIMATE = 0, 1, 2, 3
ACTIONS = {"skip": SKIP, "execute": EXECUTE, "repeat": REPEAT, "approximate": APPROXIMATE}

_CHOICES = {
    "units": ("layer", "attention", "mlp", "sub_layer"),
    "scope": ("sequence", "token"),
    "router": ("mlp", "linear", "fixed", "random", "capacity"),
    "router_activation": ("gelu", "relu"),
    "pooling": ("windows", "tokens", "mean"),
    "gate": ("softmax", "sigmoid"),
    "init": ("execute", "paper"),
    "train_mode": ("hard", "soft", "gumbel", "sample", "gate"),
    "branch_scale": ("none", "straight_through", "value"),
    "budget_kind": ("interpolation", "threshold", "rate"),
}
BUDGET_RANGE = {"interpolation": (-1.0, 1.0), "threshold": (0.0, 1.0), "rate": (0.0, 1.0)}


@names_unknown_fields
@dataclass
class LayerRoutingConfig(PeftConfig):
    """Configuration of layer routers, for `peft.get_peft_model` and native `add_adapter`.

    Start from a preset: `LayerRoutingConfig.from_preset("dr_llm")`. The defaults route whole layers per sequence with
    a bottleneck MLP over eight windows of the prompt. The first layer of each attention kind stays unrouted unless
    `layers` names it, because transformers sizes the masks of all layers from its cache.
    """

    preset: str | None = field(default=None, metadata={"help": "Name of the preset these values came from."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Not used: layers are found from the model's structure."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the routed layers; None = all but the first of each kind."}
    )
    start: float = field(
        default=0.0, metadata={"help": "Share of the layers, counted from the bottom, that stays unrouted, in [0, 1)."}
    )
    units: str = field(
        default="layer",
        metadata={"help": "What is routed: layer, attention, mlp, or sub_layer (both, each by itself)."},
    )
    scope: str = field(
        default="sequence",
        metadata={
            "help": "sequence: decided once from the prompt, obeyed while decoding; token: decided for each token."
        },
    )
    actions: list[str] = field(
        default_factory=lambda: ["skip", "execute", "repeat"],
        metadata={
            "help": "What the router may choose: skip, execute, repeat, approximate; execute is always among them."
        },
    )
    router: str = field(
        default="mlp",
        metadata={"help": "mlp, linear, fixed (static), random, or capacity (top tokens, causal predictor)."},
    )
    router_hidden: int | None = field(
        default=128, metadata={"help": "Hidden width of the mlp router; None = max(width / 4 - 200, 16)."}
    )
    router_activation: str = field(default="gelu", metadata={"help": "gelu (tanh form) or relu."})
    gate: str = field(
        default="softmax",
        metadata={"help": "softmax: one logit an action; sigmoid: one logit for execute (two actions)."},
    )
    pooling: str = field(
        default="windows",
        metadata={"help": "Sequence scope: windows (mean logits), tokens (mean probabilities), mean (one mean input)."},
    )
    windows: int = field(default=8, metadata={"help": "Windows of the prompt, at most; 1 or more."})
    init: str = field(
        default="execute", metadata={"help": "execute: a fresh router executes everything; paper: the method's own."}
    )
    forecaster_hidden: int | None = field(
        default=None, metadata={"help": "Hidden width of the module that stands in for a unit; needed to approximate."}
    )
    train_mode: str = field(
        default="hard",
        metadata={"help": "How a decision acts in training: hard, soft (mixture), gumbel, sample (policy), gate."},
    )
    branch_scale: str = field(
        default="none",
        metadata={
            "help": "Weight of the chosen branch: none; straight_through (value 1, has a gradient); value (the gate)."
        },
    )
    budget: float = field(
        default=0.0, metadata={"help": "Compute knob that set_budget moves; its range is the kind's."}
    )
    budget_kind: str = field(
        default="interpolation",
        metadata={
            "help": "interpolation in [-1, 1]; threshold on P(execute) in [0, 1]; rate of skipped units in [0, 1]."
        },
    )
    losses: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Coefficients of the routing losses by name: rate, weight, target, square, similarity, capacity."
        },
    )
    target_rate: float = field(
        default=0.25,
        metadata={"help": "Share of unit applications to save, for the target loss and capacity, in [0, 1]."},
    )
    tau: float = field(default=1.0, metadata={"help": "Gumbel temperature in training; a recipe anneals it."})
    skip_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Fixed router: exactly the layers to skip, which sets the budget; None = `budget` of them."},
    )
    skip_order: list[int] | None = field(
        default=None,
        metadata={"help": "Fixed router: routed layers, least important first: what a budget skips; None = evenly."},
    )
    seed: int = field(default=0, metadata={"help": "Random router: its seed."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.validate()

    @property
    def action_codes(self) -> tuple[int, ...]:
        """Codes of the actions, in the order of the router's logits."""
        return tuple(ACTIONS[name] for name in self.actions)

    def validate(self) -> None:
        """Check values and their combinations.

        Raises:
            ConfigError: naming the field, what it is, what is expected.
        """
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}.")
        unknown = [name for name in self.actions if name not in ACTIONS]
        if unknown or "execute" not in self.actions or len(set(self.actions)) != len(self.actions):
            raise ConfigError(
                f"actions is {self.actions}, expected distinct names out of {', '.join(ACTIONS)} with 'execute' among them."
            )
        if "approximate" in self.actions and not self.forecaster_hidden:
            raise ConfigError("actions has 'approximate' but forecaster_hidden is not set: give its width, 1 or more.")
        if "repeat" in self.actions and (self.units != "layer" or self.scope != "sequence"):
            raise ConfigError(
                "actions has 'repeat', which needs units='layer' and scope='sequence': a sub-layer's input norm lies "
                f"outside it, and a token cannot run a layer twice; got units={self.units!r}, scope={self.scope!r}."
            )
        if self.gate == "sigmoid" and len(self.actions) != 2:
            raise ConfigError(f"gate is 'sigmoid', which chooses between two actions, but actions is {self.actions}.")
        if self.train_mode in ("soft", "gumbel", "gate") and len(self.actions) != 2:
            raise ConfigError(f"train_mode {self.train_mode!r} mixes two actions, but actions is {self.actions}.")
        if self.train_mode == "sample" and self.scope != "sequence":
            raise ConfigError("train_mode 'sample' needs scope='sequence': one sampled decision a unit and sequence.")
        if self.router == "capacity" and self.train_mode != "gate":
            raise ConfigError("router 'capacity' needs train_mode='gate'.")
        if self.router == "capacity" and self.scope != "token":
            raise ConfigError("router 'capacity' chooses among tokens: it needs scope='token'.")
        if self.router in ("fixed", "random") and self.budget_kind != "rate":
            raise ConfigError(f"router {self.router!r} needs budget_kind='rate', got {self.budget_kind!r}.")
        if self.skip_layers is not None and self.skip_order is not None:
            raise ConfigError("skip_layers and skip_order are both set: name the layers, or the order they go in.")
        for name in ("skip_layers", "skip_order"):
            named = getattr(self, name) or []
            if len(set(named)) != len(named):
                raise ConfigError(f"{name} is {named}, expected distinct layer indices or None.")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ConfigError(f"layers is {self.layers}, expected distinct layer indices or None.")
        for name, low, high in (("start", 0.0, 0.999), ("target_rate", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a value in [{low}, {high}].")
        check_budget(self.budget_kind, self.budget)
        for name in ("windows", "router_hidden", "forecaster_hidden"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}, expected a whole number of at least 1.")
        if self.tau <= 0:
            raise ConfigError(f"tau is {self.tau}, expected a value above 0.")
        from moe_kit.depth.losses import LOSSES

        for name in self.losses:
            if name not in LOSSES:
                raise ConfigError(f"unknown routing loss {name!r}.{suggestion(name, LOSSES)}")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and complete the model card beside it by how to load the adapter.

        Args:
            save_directory: folder.
            **kwargs: as for PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        complete_card(save_directory, str(getattr(self.peft_type, "value", self.peft_type)))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LayerRoutingConfig:
        """Configuration of a published method.

        Args:
            name: one of `presets()`.
            **overrides: any field, such as `layers=[4, 5, 6]`.

        Returns:
            The configuration.

        Raises:
            ConfigError: if the preset or a field is unknown; the nearest name is suggested.

        Example:
            >>> from moe_kit.depth import LayerRoutingConfig
            >>> LayerRoutingConfig.from_preset("dr_llm").actions
            ['skip', 'execute', 'repeat']
        """
        from moe_kit.depth.presets import PRESETS

        known = {f.name for f in fields(cls)}
        for key in overrides:
            if key not in known:
                raise ConfigError(f"LayerRoutingConfig has no field {key!r}.{suggestion(key, known)}")
        if name not in PRESETS:
            raise ConfigError(f"unknown layer-routing preset {name!r}.{suggestion(name, PRESETS)}")
        return cls(**{**PRESETS[name].values, **overrides, "preset": name})

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names of all presets."""
        from moe_kit.depth.presets import PRESETS

        return tuple(PRESETS)


def check_budget(kind: str, value: float) -> None:
    """Refuse a budget outside its kind's range.

    Raises:
        ConfigError: naming the range.
    """
    low, high = BUDGET_RANGE[kind]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"budget is {value!r}, expected a number in [{low:g}, {high:g}] for budget_kind {kind!r}.")
