"""PEFT LoRA folders as experts.

Each folder becomes one expert at every linear that it adapts. Ranks may differ: lower ones are padded with zeros,
which changes nothing. The LoRA's own scale goes into B. A folder without an adapter for some linear gives an expert
that adds nothing there. Only safetensors are read.

Shapes: L rank, D width in, O width out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_kit.adapters.config import RoutedAdapterConfig
from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.experts.lora import LoRABank

_PREFIX = "base_model.model."
_REFUSED = ("use_dora", "lora_bias", "alora_invocation_tokens", "use_bdlora", "kasa_config", "use_qalora")
# starts that take from the base what they put into A and B
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class ExternalLoRA:
    """One LoRA, read from a folder.

    Attributes:
        name: name of the folder.
        factors: module path -> (A [L, D], B [O, L]) with the scale in B.
    """

    name: str
    factors: dict[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """Greatest rank of its linears."""
        return max(A.shape[0] for A, _ in self.factors.values())


def read_lora(folder: str | Path) -> ExternalLoRA:
    """Read a PEFT LoRA folder.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The LoRA, its alpha / r folded into B.

    Raises:
        CheckpointError: if a file is missing, truncated or no plain LoRA.
    """
    folder = Path(folder)
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise CheckpointError(f"{folder} is no PEFT LoRA folder: {file.name} is missing (safetensors only).")
    try:
        config = json.loads(config_file.read_text())
        tensors = load_file(weights_file)
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}. Save the adapter again.") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} holds a {config.get('peft_type')} adapter, expected a LORA one.")
    refused = [name for name in _REFUSED if config.get(name)]
    if refused:
        raise CheckpointError(f"{folder} uses {', '.join(refused)}, which is no plain sum of B A x: retrain without.")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{folder} was started by init_lora_weights={start!r}, which changed the base's weights, so on the base itself it "
            "would add the wrong thing. Save it as a plain LoRA: PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    factors = {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        B = tensors.get(key.replace(".lora_A.", ".lora_B."))
        path = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        if B is None or B.shape[1] != A.shape[0]:
            raise CheckpointError(f"{folder}: {path} has no lora_B that fits its lora_A.")
        alphas = config.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(alphas, path), config["lora_alpha"])
        rank = A.shape[0]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        factors[path] = (A.float(), B.float() * scale)
    extra = [key for key in tensors if ".lora_A." not in key and ".lora_B." not in key]
    if extra or not factors:
        raise CheckpointError(f"{folder} holds tensors that are no LoRA of a linear: {', '.join(extra[:3]) or 'none'}.")
    return ExternalLoRA(folder.name, factors)


def read_adapters(config: RoutedAdapterConfig) -> list[ExternalLoRA]:
    """Read the LoRAs that a configuration names, and fit it to them.

    Sets `num_experts`, `r`, `scale`, `expert_names`, freezes the bank unless told otherwise, and empties
    `from_adapters`: the experts are saved with the adapter and the folders are not needed again.

    Args:
        config: its `from_adapters` may be None.

    Returns:
        The LoRAs, in order.

    Raises:
        ConfigError: if the bank is not "lora".
        CheckpointError: if a folder cannot be used.
    """
    if not config.from_adapters:
        return []
    if config.bank != "lora":
        raise ConfigError(f"from_adapters makes LoRA experts, but bank is {config.bank!r}: set bank='lora'.")
    found = [read_lora(folder) for folder in config.from_adapters]
    config.num_experts, config.r = len(found), max(lora.rank for lora in found)
    config.scale, config.expert_layout = 1.0, None
    config.rank_pattern, config.alpha_pattern, config.expert_pattern = {}, {}, {}
    config.bank_options = {"frozen": True, **config.bank_options}
    config.expert_names = [lora.name for lora in found]
    if config.target_modules is None:
        config.target_modules = sorted({path for lora in found for path in lora.factors})
    config.from_adapters = None
    config.validate()
    return found


def fill_experts(model: nn.Module, adapter_name: str, config: RoutedAdapterConfig, loras: list[ExternalLoRA]) -> None:
    """Copy LoRAs into the banks of an adapter.

    Args:
        model: the wrapped inner model.
        adapter_name: adapter.
        config: its configuration.
        loras: one for each expert.

    Raises:
        ConfigError: if a LoRA adapts a linear that this adapter does not, or widths differ.
    """
    banks = {
        name: module.moe_adapter_bank[adapter_name]
        for name, module in model.named_modules()
        if hasattr(module, "moe_adapter_bank") and adapter_name in module.moe_adapter_bank
    }
    for expert, lora in enumerate(loras):
        missing = sorted(set(lora.factors) - set(banks))
        if missing:
            raise ConfigError(
                f"{lora.name} adapts {missing[0]} and {len(missing) - 1} more linears that target_modules "
                f"{config.target_modules!r} leave out: leave target_modules unset to adapt what the LoRAs adapt."
            )
        for path, bank in banks.items():
            assert isinstance(bank, LoRABank)
            with torch.no_grad():
                bank.B[expert].zero_()
                if path not in lora.factors:
                    continue
                A, B = lora.factors[path]
                if A.shape[1] != bank.width_in or B.shape[0] != bank.width_out:
                    raise ConfigError(
                        f"{lora.name} at {path} maps {A.shape[1]} to {B.shape[0]}, the model {bank.width_in} to "
                        f"{bank.width_out}: it was trained on another base."
                    )
                bank.A[expert].zero_()
                bank.A[expert, : A.shape[0]].copy_(A)
                bank.B[expert, :, : A.shape[0]].copy_(B)
