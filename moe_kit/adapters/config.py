"""`RoutedAdapterConfig`: the PEFT configuration of routed adapters.

Fields are plain JSON, as PEFT's conventions ask; a preset is a set of field values with a name and a source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft.config import PeftConfig
from torch import nn

from moe_kit.adapters.refused import REFUSED_OPTIONS
from moe_kit.errors import ConfigError
from moe_kit.hf.adapter_files import check_adapter_folder
from moe_kit.hf.fields import names_unknown_fields, reason
from moe_kit.hf.model_card import complete_card
from moe_kit.hf.registration import add_peft_type
from moe_kit.hf.sharing import SHARING

PEFT_TYPE = add_peft_type("MOE_ADAPTER")
ALL_LINEAR = "all-linear"


@names_unknown_fields
@dataclass
class RoutedAdapterConfig(PeftConfig):
    """Configuration of a mixture of adapters with a router, for `peft.get_peft_model`.

    Start from a preset: `RoutedAdapterConfig.from_preset("mixture_of_lora", num_experts=8, top_k=2, r=8)`.
    Every method is a bank of experts with a router of four parts: scope, score, select and weight.
    """

    refused_fields: ClassVar[dict[str, str]] = REFUSED_OPTIONS

    preset: str | None = field(default=None, metadata={"help": "Name of the preset these values came from."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linears to adapt: names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Linears to leave alone."})
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Stacked expert weights of a mixture-of-experts base, such as 'experts.gate_up_proj': each base expert "
            "gets one LoRA of rank r, chosen by the base's own router. Without target_modules nothing else is adapted."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; None adapts all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    layer_replication: list[tuple[int, int]] | None = field(
        default=None,
        metadata={
            "help": "Build a deeper model from ranges of its layers before adapting it: [[0, 4], [2, 5]] runs layers 0 1 2 3 "
            "2 3 4, which share their weights and have adapters of their own."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and save with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Rows of the embedding to train and save, or {'module': rows}; tied weights follow."},
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "Keep tied weights tied where modules_to_save or trainable_token_indices copy one of them."},
    )
    num_experts: int = field(default=8, metadata={"help": "Experts at each adapted linear, 1 or more."})
    top_k: int = field(default=2, metadata={"help": "Active experts a decision, 1 to num_experts."})
    r: int = field(default=8, metadata={"help": "Rank of one expert, 1 or more."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The mixture is multiplied by lora_alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Multiply by lora_alpha / sqrt(r) instead."})
    scale: float | None = field(
        default=None, metadata={"help": "Multiplier of the mixture itself; wins over lora_alpha."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input, in [0, 1)."})
    bank: str = field(default="lora", metadata={"help": "Kind of experts."})
    bank_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Further arguments of the bank."})
    scope: str = field(
        default="token",
        metadata={"help": "What one decision is about: token, sequence, request (a batch row) or task."},
    )
    scope_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Further arguments of the scope."})
    score: str = field(default="linear", metadata={"help": "How experts are scored."})
    score_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Further arguments of the score."})
    select: str = field(default="top_k", metadata={"help": "Which experts are used."})
    select_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Further arguments of the selection."}
    )
    weight: str = field(default="selected_softmax", metadata={"help": "How much each chosen expert counts."})
    weight_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Further arguments of the weights."})
    losses: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Coefficients of auxiliary losses by name, such as {'switch': 0.01}."}
    )
    loss_options: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "Further arguments of losses by name, such as {'cv_typed': {'delta': 0.2}}."},
    )
    balance_scope: str = field(
        default="micro",
        metadata={
            "help": "Batch that auxiliary losses balance: 'micro' (each process and micro-batch its own) or 'global' "
            "(the joined batch of all processes, one small all-reduce for each loss)."
        },
    )
    stepper: str | None = field(
        default=None, metadata={"help": "Balance state that moves once an optimizer step, such as 'loss_free'."}
    )
    stepper_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Further arguments of the stepper."}
    )
    router_sharing: str = field(
        default="input", metadata={"help": "Linears that share a router: none, input (q,k,v; gate,up), block, model."}
    )
    detach_router_input: bool = field(
        default=False, metadata={"help": "No gradient from the router into the hidden states."}
    )
    router_freeze_after: int | None = field(
        default=None, metadata={"help": "Optimizer steps after which the router stays as it is; None = never."}
    )
    freeze_experts: bool = field(default=False, metadata={"help": "Keep the experts as they are; train the router."})
    freeze_router: bool = field(
        default=False, metadata={"help": "Keep the router, its biases and thresholds as they are."}
    )
    router_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the router in moe_kit's trainer; None = the adapters' own."}
    )
    num_tasks: int | None = field(default=None, metadata={"help": "Rows of the task table of task-scope routers."})
    expert_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "num_experts for modules whose path is, or ends in, a match of a regular expression."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "r for modules whose path is, or ends in, a match of a regular expression."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "lora_alpha for modules whose path is, or ends in, a match of a regular expression."},
    )
    expert_layout: list[int] | None = field(
        default=None,
        metadata={"help": "num_experts by depth: the layers fall into as many equal parts as there are entries."},
    )
    causal_leak: str | None = field(
        default=None,
        metadata={
            "help": "'allow' lets expert choice and GShard's capacity look at later tokens of a causal model; default: an error."
        },
    )
    from_adapters: list[str] | None = field(
        default=None,
        metadata={"help": "Folders of PEFT LoRAs that become the experts, one each; read once, then saved with ours."},
    )
    expert_names: list[str] | None = field(default=None, metadata={"help": "Names of the experts, for reports."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value))
        if self.ensure_weight_tying:
            # PEFT's notes on what it ties; not part of the configuration
            self.modules_to_tie = None
        self.validate()

    def validate(self) -> None:
        """Check values and their combinations.

        Raises:
            ConfigError: naming the field, what it is, what is expected.
        """
        for name in ("num_experts", "top_k", "r"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}, expected a whole number of at least 1.")
        for name, patterns in (("num_experts", self.expert_pattern), ("r", self.rank_pattern)):
            for pattern, value in patterns.items():
                _check_pattern(pattern, name)
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ConfigError(f"{name} for {pattern!r} is {value!r}, expected a whole number of at least 1.")
        self._validate_alpha()
        self._validate_layers()
        if self.expert_layout is not None and (
            not self.expert_layout or any(not isinstance(n, int) or n < 1 for n in self.expert_layout)
        ):
            raise ConfigError(f"expert_layout is {self.expert_layout!r}, expected whole numbers of at least 1.")
        # a layout gives every layer a count; patterns win where they match
        smallest = min([*(self.expert_layout or [self.num_experts]), *self.expert_pattern.values()])
        if self.select in ("top_k", "sample_k", "capacity", "expert_choice", "positive") and self.top_k > smallest:
            raise ConfigError(
                f"top_k is {self.top_k} but a module has only {smallest} experts: lower top_k, or raise num_experts, "
                "expert_layout or expert_pattern."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, expected a value in [0, 1).")
        if self.dropout and self.bank == "rank_one" and self.score not in ("frozen_sparse", "identity"):
            raise ConfigError(
                f"dropout is {self.dropout}, but the experts of bank 'rank_one' have no input of their own under score "
                f"{self.score!r}: use score 'frozen_sparse', before whose projection it stands, or dropout 0."
            )
        if self.balance_scope not in ("micro", "global"):
            raise ConfigError(f"balance_scope is {self.balance_scope!r}, expected 'micro' or 'global'.")
        if self.weight == "remix" and self.rank_pattern and self.router_sharing != "none":
            raise ConfigError(
                "rank_pattern gives linears different ranks, but remix's weight 2/sqrt(k r) is the shared router's own: "
                "set router_sharing='none', so that each linear has the weight of its rank."
            )
        if self.router_sharing not in SHARING:
            raise ConfigError(f"router_sharing is {self.router_sharing!r}, expected one of {', '.join(SHARING)}.")
        if self.target_parameters is not None and (
            isinstance(self.target_parameters, str)
            or not self.target_parameters
            or not all(isinstance(name, str) for name in self.target_parameters)
        ):
            raise ConfigError(
                f"target_parameters is {self.target_parameters!r}, expected a list of names such as "
                "['experts.gate_up_proj', 'experts.down_proj'], or none."
            )
        if self.target_parameters and self.from_adapters:
            raise ConfigError(
                "from_adapters makes experts of linears and target_parameters adapts the base's own experts: use two "
                "adapters, one for each."
            )
        if self.causal_leak not in (None, "allow"):
            raise ConfigError(f"causal_leak is {self.causal_leak!r}, expected 'allow' or none.")
        if self.num_tasks is not None and (not isinstance(self.num_tasks, int) or self.num_tasks < 1):
            raise ConfigError(f"num_tasks is {self.num_tasks!r}, expected a whole number of at least 1.")
        if "task" in (self.scope, self.score.removesuffix("_table")) and self.scope != self.score.removesuffix(
            "_table"
        ):
            raise ConfigError(
                f"scope {self.scope!r} with score {self.score!r}: a task table needs scope 'task', and the reverse."
            )
        if self.scope == "task" and not self.num_tasks:
            raise ConfigError("scope is 'task' but num_tasks is not set: give the number of tasks, 1 or more.")

    def _validate_alpha(self) -> None:
        for pattern, value in self.alpha_pattern.items():
            _check_pattern(pattern, "lora_alpha")
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ConfigError(f"lora_alpha for {pattern!r} is {value!r}, expected a number.")
        if self.alpha_pattern and self.scale is not None and (self.target_modules or not self.target_parameters):
            raise ConfigError(
                f"alpha_pattern sets lora_alpha by module, but scale is {self.scale}, which wins over every lora_alpha: leave "
                "scale unset (scale=None), or leave alpha_pattern empty."
            )

    def _validate_layers(self) -> None:
        is_expression = isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR
        for name in ("layers_to_transform", "layers_pattern"):
            if is_expression and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, but target_modules {self.target_modules!r} is a regular expression, "
                    "which names the layers itself: write them into it, or give target_modules as a list of names."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern is {self.layers_pattern!r} but layers_to_transform is not set: say which layers, or leave both."
            )
        for pair in self.layer_replication or ():
            if len(pair) != 2 or not all(isinstance(index, int) for index in pair) or not 0 <= pair[0] < pair[1]:
                raise ConfigError(
                    f"layer_replication has {pair!r}, expected pairs [first, last + 1] of layer indices such as [0, 4]."
                )

    def check_model(self, model: nn.Module) -> None:
        """Fit this configuration to a model, before anything is changed in it.

        Refuses what would be wrong on this model, and turns `expert_layout` into `expert_pattern`.

        Args:
            model: the base model.

        Raises:
            ConfigError: if the selection would let a causal model look ahead, or the layers cannot be counted.
        """
        look = self._look_ahead()
        if look is not None and self.causal_leak is None and is_causal(model):
            raise ConfigError(
                f"select is {self.select!r} and {type(model).__name__} is causal: {look[0]} would depend on later tokens, in "
                f"training but not while generating. Choose {look[1]}, or say causal_leak='allow'."
            )
        if self.expert_layout is not None:
            layout = layout_pattern(model, self.expert_layout)
            # a saved configuration holds them already, sorted among the user's own patterns, which go first
            made = {*layout, *(key.removesuffix(r"\..*") for key in layout)}
            own = {key: count for key, count in self.expert_pattern.items() if key not in made}
            self.expert_pattern = {**own, **layout}

    def _look_ahead(self) -> tuple[str, str] | None:
        """What later tokens decide about and the causal form of it, if the selection compares tokens of a sequence."""
        if self.select == "expert_choice" and self.select_options.get("threshold") is None:
            return "whether an expert takes a token", "the causal form with select_options={'threshold': 'ema'}"
        if self.select == "capacity" and self.select_options.get("policy") == "gshard":
            return (
                "whether a second choice finds room (all first choices go before it)",
                "select_options={'policy': 'switch'}, which fills places by order of arrival",
            )
        return None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and complete the model card beside it by how to load the adapter.

        Args:
            save_directory: folder.
            **kwargs: as for PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        complete_card(save_directory, str(getattr(self.peft_type, "value", self.peft_type)))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> RoutedAdapterConfig:
        """Configuration of a published method.

        Args:
            name: one of `presets()`.
            **overrides: any field, such as `num_experts=8, top_k=2, r=8, target_modules="all-linear"`.

        Returns:
            The configuration.

        Raises:
            ConfigError: if the preset or a field is unknown; the nearest name is suggested.

        Example:
            >>> from moe_kit.adapters import RoutedAdapterConfig
            >>> RoutedAdapterConfig.from_preset("remix", top_k=2).select
            'sample_k'
        """
        from moe_kit.adapters.presets import get_preset

        known = {f.name for f in fields(cls)}
        for key in overrides:
            if key not in known:
                raise ConfigError(f"RoutedAdapterConfig has no field {key!r}{reason(cls, key, known)}")
        preset = get_preset(name)
        return cls(**{**preset.values(overrides), **overrides, "preset": name})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RoutedAdapterConfig:
        """Read a saved configuration, after a look at the weights beside it.

        Args:
            pretrained_model_name_or_path: local folder or hub id.
            subfolder: folder inside it.
            **kwargs: as for PEFT.

        Raises:
            CheckpointError: if the weights beside it are a pickle, cut off, or another method's.
            ConfigError: if its values do not fit together.
        """
        folder = Path(pretrained_model_name_or_path)
        check_adapter_folder(folder / subfolder if subfolder else folder, "moe_adapter_")
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names of all presets."""
        from moe_kit.adapters.presets import PRESETS

        return tuple(PRESETS)


def _check_pattern(pattern: str, name: str) -> None:
    try:
        re.compile(f"({pattern})")
    except re.error as error:
        raise ConfigError(f"the pattern {pattern!r} of {name} is no regular expression: {error}.") from error


def is_causal(model: nn.Module) -> bool:
    """True if some attention of the model hides later tokens.

    Args:
        model: a Hugging Face model; its attention modules say so in `is_causal`. Without any such module the name of
            the class decides.
    """
    flags = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if flags:
        return any(flag is True for flag in flags)
    return any(word in type(model).__name__ for word in ("CausalLM", "LMHead", "ConditionalGeneration"))


def layout_pattern(model: nn.Module, layout: list[int]) -> dict[str, int]:
    """Expert counts by depth as patterns over module paths.

    Args:
        model: its longest module list is the stack of layers.
        layout: expert counts, first layers first; the layers fall into equal parts, earlier parts take the rest.

    Returns:
        pattern -> num_experts.

    Raises:
        ConfigError: if the model has no module list, or fewer layers than parts.
    """
    lists = [(len(m), name) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name]
    if not lists:
        raise ConfigError("expert_layout counts layers, and this model has no list of layers: use expert_pattern.")
    count, path = max(lists, key=lambda item: (item[0], -len(item[1])))
    if count < len(layout):
        raise ConfigError(f"expert_layout has {len(layout)} parts but the model {count} layers.")
    parts: dict[int, list[int]] = {}
    for layer in range(count):
        parts.setdefault(layer * len(layout) // count, []).append(layer)
    leaf = re.escape(path.rpartition(".")[2])
    return {rf"{leaf}\.({'|'.join(map(str, layers))})\..*": layout[part] for part, layers in parts.items()}
