r"""`AdaptedExperts`: one LoRA on each expert of a mixture-of-experts base, chosen by the base's own router.

    y_t = sum_{e chosen for t} w_te * down'_e(act(up'_e(x_t))),   W'_e = W_e + (alpha / r) B_e A_e

There is no router of ours here: the base's ids and weights decide, and expert e brings its own A_e, B_e. `W'_e` is never
formed; `moe_kit_kernels.lora_grouped` multiplies by both parts. Asked for by `target_parameters`, PEFT's own word for
weights that are parameters and not modules.

Source: LoRA, arXiv 2106.09685. Not to be confused with `RoutedLayer`, whose experts are LoRAs on one dense linear.

Keys of a saved adapter: `<experts>.moe_adapter_bank.<adapter>.<weight>.A` / `.B`.

Shapes: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_kit.adapters.config import RoutedAdapterConfig
from moe_kit.adapters.mixed_batch import RowAdapters
from moe_kit.adapters.parts import sizes_of
from moe_kit.errors import RoutingError
from moe_kit.hf.experts import run_experts, weight_of
from moe_kit.hf.tuner_layer import FrozenStateLayer
from moe_kit.routing.plain import call_with, is_untouched

if TYPE_CHECKING:
    from moe_kit_kernels import RoutePlan


class ExpertLoRA(nn.Module):
    """A LoRA for each matrix of a stack. B starts at zero, A as PEFT's LoRA does.

    Args:
        num_experts: E.
        width_in: D.
        width_out: O.
        rank: L, 1 or more.
        scale: alpha / r.
        dropout: probability of dropping an element of A's input in training, in [0, 1).
    """

    def __init__(
        self, num_experts: int, width_in: int, width_out: int, rank: int, *, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width_in)
        self.A = nn.Parameter(torch.empty(num_experts, rank, width_in).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(num_experts, width_out, rank))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else None

    @property
    def drops(self) -> bool:
        """Whether dropout acts now."""
        return self.dropout is not None and self.training

    def forward(self, x: Tensor, out_PO: Tensor, plan: RoutePlan, *, gather: bool, scatter: bool) -> Tensor:
        """Add the low-rank part of each row's expert.

        Args:
            x: float [T, D] tokens with `gather`, else [P, D] rows sorted by expert.
            out_PO: float [P, O], what is added to; given order with `scatter`, else sorted.
            plan: the base's routing.
            gather: x holds tokens.
            scatter: out_PO is in the given order.

        Returns:
            float [P, O].
        """
        from moe_kit_kernels import grouped_mm

        if self.dropout is not None:
            x = self.dropout(x)
        h_PL = grouped_mm(x, self.A.to(out_PO.dtype), plan, gather=gather) * self.scale
        return grouped_mm(h_PL, self.B.to(out_PO.dtype), plan, scatter=scatter, residual=out_PO)

    def delta(self, expert: int) -> Tensor:
        """What one expert's matrix gains.

        Args:
            expert: its index.

        Returns:
            float [O, D].
        """
        return self.scale * (self.B[expert] @ self.A[expert])

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        E, L, D = self.A.shape
        return f"experts={E}, rank={L}, in={D}, out={self.B.shape[1]}"


class AdaptedExperts(nn.Module, FrozenStateLayer):
    """The experts of one block with a LoRA on each.

    Args:
        base_layer: an experts module of transformers, see `moe_kit.hf.experts`.
        path: module path of it.
    """

    adapter_layer_names = ("moe_adapter_bank",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moe_adapter_bank = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self.path = path

    def update_layer(
        self, adapter_name: str, config: RoutedAdapterConfig, names: Sequence[str], inference_mode: bool = False
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: its configuration; rank (with `rank_pattern`), alpha, rank-stabilised scale and dropout count here.
            names: weights that it adapts.
            inference_mode: add it frozen.
        """
        stacks = nn.ModuleDict()
        for name in names:
            weight_EOD = self.weight(name)
            E, O, D = weight_EOD.shape
            sizes = sizes_of(config, f"{self.path}.{name}", D, O)
            # config.scale is about mixtures of ours, whose weights may carry a scale of their own
            scale = sizes.alpha / (math.sqrt(sizes.rank) if config.use_rslora else sizes.rank)
            stacks[name] = ExpertLoRA(E, D, O, sizes.rank, scale=scale, dropout=config.dropout)
            if not stacks[name].A.is_meta and not weight_EOD.is_meta:
                stacks[name].to(weight_EOD.device)
        # one that joins a model in evaluation mode must not drop anything
        self.moe_adapter_bank[adapter_name] = stacks.train(self.training)
        if config.freeze_experts:
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: ("moe_adapter_bank",)}
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def cast_bank(self, adapter_name: str) -> None:
        """Give the LoRAs of an adapter the dtype of the base's experts.

        Args:
            adapter_name: its name; a module without it stays as it is.
        """
        if adapter_name in self.moe_adapter_bank:
            for name, lora in self.moe_adapter_bank[adapter_name].items():
                lora.to(self.weight(name).dtype)

    def weight(self, name: str) -> Tensor:
        """A stack of the base as [E, O, D].

        Args:
            name: "gate_up_proj", "up_proj" or "down_proj".
        """
        return weight_of(self.get_base_layer(), name)

    def adapters_of(self, name: str, adapters: Sequence[str]) -> list[ExpertLoRA]:
        """Adapters of one stack.

        Args:
            name: name of the stack.
            adapters: which; those without a LoRA here are left out.
        """
        banks = [self.moe_adapter_bank[a] for a in adapters if a in self.moe_adapter_bank]
        return [bank[name] for bank in banks if name in bank]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapter_names: RowAdapters | None = None,
    ) -> Tensor:
        """Run the experts that the base's router chose, each with its LoRA.

        Args:
            hidden_states: float [T, D].
            top_k_index: int [T, K]; ids of E or more are empty slots.
            top_k_weights: float [T, K].
            adapter_names: adapter of each row; None = the active ones for all.

        Returns:
            float [T, D] of the input's dtype.

        Raises:
            RoutingError: if rows have adapters while adapters are merged.
        """
        if self._disable_adapters and self.merged:
            # as PEFT's LoRA does: without its adapters the layer is the base
            self.unmerge()
        if adapter_names is None or self._disable_adapters:
            return self._adapted(self.active_adapters, hidden_states, top_k_index, top_k_weights)
        if self.merged:
            raise RoutingError(
                f"adapter_names: {', '.join(self.merged_adapters)} is merged into {self.path}, so every row has it: call "
                "unmerge_adapter() first."
            )
        tokens = hidden_states.shape[0]
        groups = adapter_names.groups(*adapter_names.rows_of(tokens), hidden_states.device)
        out_TD = self.base_layer(hidden_states, top_k_index, top_k_weights)
        for adapter, (_, tokens_U) in groups.items():
            if adapter in self.moe_adapter_bank:
                own = (value[tokens_U] for value in (hidden_states, top_k_index, top_k_weights))
                out_TD = out_TD.index_copy(0, tokens_U, self._adapted([adapter], *own))
        return out_TD

    def _adapted(self, adapters: Sequence[str], *inputs: Tensor) -> Tensor:
        """The experts under some adapters."""
        if self._disable_adapters or self.merged or not any(name in self.moe_adapter_bank for name in adapters):
            return self.base_layer(*inputs)
        run = partial(self._run, adapters)
        return run(*inputs) if is_untouched(self.base_layer) else call_with(self.base_layer, run, *inputs)

    def _run(
        self, adapters: Sequence[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        product = partial(self._product, adapters)
        return run_experts(self.base_layer, hidden_states, top_k_index, top_k_weights, product)

    def _product(
        self,
        names: Sequence[str],
        name: str,
        x: Tensor,
        plan: RoutePlan,
        *,
        gather: bool = False,
        scatter: bool = False,
    ) -> Tensor:
        """Rows times their expert's matrix, LoRA and bias included."""
        from moe_kit_kernels import grouped_mm, lora_grouped

        weight_EOD, adapters = self.weight(name), self.adapters_of(name, names)
        bias_EO = getattr(self.base_layer, f"{name}_bias") if self.base_layer.has_bias else None
        order = {"gather": gather, "scatter": scatter}
        only = adapters[0] if len(adapters) == 1 and bias_EO is None else None
        if only is not None and not only.drops and is_untouched(only):
            return lora_grouped(x, weight_EOD, only.A, only.B, plan, scale=only.scale, **order)
        y_PO = grouped_mm(x, weight_EOD, plan, bias_EO=bias_EO, **order)
        for adapter in adapters:
            y_PO = adapter(x, y_PO, plan, **order)
        return y_PO

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the LoRAs to the base's weights: unlike a routed mixture, each expert's LoRA is a constant matrix.

        Args:
            safe_merge: look for values that are not finite first.
            adapter_names: which adapters; None = the active ones.

        Raises:
            RoutingError: with `safe_merge`, if a merged weight would not be finite; nothing is changed then.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self.moe_adapter_bank and n not in self.merged_adapters]
        for adapter in names:
            if safe_merge:
                self._check_finite(adapter)
            self._add(adapter, 1.0)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract what `merge` added."""
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1.0)

    def _add(self, adapter: str, sign: float) -> None:
        with torch.no_grad():
            for name, lora in self.moe_adapter_bank[adapter].items():
                weight_EOD = self.weight(name)
                for expert in range(weight_EOD.shape[0]):
                    weight_EOD[expert] += sign * lora.delta(expert).to(weight_EOD.dtype)

    def _check_finite(self, adapter: str) -> None:
        for name, lora in self.moe_adapter_bank[adapter].items():
            weight_EOD = self.weight(name)
            for expert in range(weight_EOD.shape[0]):
                if not (weight_EOD[expert] + lora.delta(expert)).isfinite().all():
                    raise RoutingError(
                        f"merging {adapter!r} would make {self.path}.{name} of expert {expert} infinite or NaN: the "
                        "adapter or the base holds such values."
                    )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts adapters of linears."""
        return False

    def __repr__(self) -> str:
        return "moe_adapter." + super().__repr__()
