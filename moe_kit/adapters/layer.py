"""`RoutedLayer`: a linear layer with routed adapters, in PEFT's form of a tuner layer.

Keys of a saved adapter: `<linear>.moe_adapter_bank.<adapter>.A` / `.B`, and `<owner>.moe_adapter_router.<adapter>....`
where the owner is the first linear of a group that shares a router.

Shapes: T tokens, D width in, O width out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_kit.adapters.config import RoutedAdapterConfig
from moe_kit.adapters.mixed_batch import RowAdapters, context_of_rows
from moe_kit.adapters.parts import build_bank, build_router, sizes_of
from moe_kit.adapters.step import DecodeStep
from moe_kit.errors import RoutingError
from moe_kit.hf.hooks import HookedRouting
from moe_kit.hf.tuner_layer import FrozenStateLayer
from moe_kit.routing.context import InputIdentity, RoutingContext, SharedInput
from moe_kit.routing.decision import Routing
from moe_kit.routing.plain import is_untouched


class RoutedLayer(nn.Module, FrozenStateLayer):
    """Base linear plus mixtures of adapters.

    Args:
        base_layer: the frozen linear, or another tuner layer around it.
        state: routing state of the model.
        path: module path of the linear.
    """

    adapter_layer_names = ("moe_adapter_bank", "moe_adapter_router")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, state: HookedRouting, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moe_adapter_bank = nn.ModuleDict()
        self.moe_adapter_router = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self.state = state
        self.path = path
        # adapter -> the layer that holds the group's router; plain, so that it is neither saved nor moved twice
        self.owners: dict[str, RoutedLayer] = {}
        self.sites: dict[str, str] = {}
        # what the last forward of a few tokens looked up, for the first layer of a group
        self.steps: dict[str, DecodeStep | None] = {}
        self.shares_any_input: dict[str, bool] = {}
        # adapter -> all linears that share its router and its input, this one included
        self.siblings: dict[str, list[RoutedLayer]] = {}
        self.place = state.structure.place(path)
        self.width_in, self.width_out = linear_widths(self.get_base_layer())
        # PEFT's names of the same, which tools read on every tuner layer
        self.in_features, self.out_features = self.width_in, self.width_out

    def update_layer(
        self, adapter_name: str, config: RoutedAdapterConfig, owner: RoutedLayer | None, inference_mode: bool = False
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            owner: the layer whose router this one shares; None = this layer gets a router of its own.
            inference_mode: add it frozen.
        """
        sizes = sizes_of(config, self.path, self.width_in, self.width_out)
        self.moe_adapter_bank[adapter_name] = build_bank(config, sizes)
        self.owners[adapter_name] = owner or self
        self.sites[adapter_name] = f"{(owner or self).path}.{adapter_name}"
        self.shares_any_input[adapter_name] = config.router_sharing in ("block", "model")
        siblings = [] if owner is None or config.router_sharing != "input" else owner.siblings[adapter_name]
        siblings.append(self)
        self.siblings[adapter_name] = siblings
        if owner is None:
            router = build_router(config, sizes)
            router.site, router.group = self.sites[adapter_name], adapter_name
            self.state.carries |= getattr(router.scope, "outlives_forward", False)
            self.moe_adapter_router[adapter_name] = router
        elif owner.moe_adapter_router[adapter_name].num_experts != sizes.slots:
            raise RoutingError(
                f"{self.path} has {sizes.slots} experts but shares the router of {owner.path}, which has "
                f"{owner.moe_adapter_router[adapter_name].num_experts}: give both the same number or set "
                "router_sharing='none'."
            )
        (owner or self).moe_adapter_router[adapter_name].banks.append(self.moe_adapter_bank[adapter_name])
        frozen = ("moe_adapter_router",) * config.freeze_router + ("moe_adapter_bank",) * config.freeze_experts
        if frozen:
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}
        # an adapter that joins a model in evaluation mode must not sample or drop anything
        for container in (self.moe_adapter_bank, self.moe_adapter_router):
            container.train(self.training)
        self._to_base_device(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _to_base_device(self, adapter_name: str) -> None:
        # parameters stay float32: routers always, banks unless the user asks PEFT for the base's dtype
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None or device.type == "meta":
            return
        for container in (self.moe_adapter_bank, self.moe_adapter_router):
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device)

    def cast_bank(self, adapter_name: str) -> None:
        """Give the experts of an adapter the dtype that the base computes in.

        Args:
            adapter_name: its name; a layer without it stays as it is.
        """
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if adapter_name in self.moe_adapter_bank and dtype is not None and dtype.is_floating_point:
            self.moe_adapter_bank[adapter_name].to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a routed mixture depends on the input.

        Raises:
            RoutingError: always.
        """
        raise RoutingError(
            "routed adapters depend on the input and cannot be merged into the base weights. Where the routing is "
            "constant, moe_kit.adapters.collapse_to_lora(model) makes a plain LoRA, which can be merged."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a routed mixture is no constant matrix."""
        return False

    def routing(self, adapter_name: str, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """The decision for this layer's input, made once for all layers that share the router and the input.

        Args:
            adapter_name: adapter.
            x: float [..., D].
            context: context of the pass for this layer's tokens; None = look it up.

        Returns:
            The routing of this pass.

        Raises:
            RoutingError: if a router shared by a block or the model cannot read the input of the layer that runs first.
        """
        context = self.state.context_for(self.place, x) if context is None else context
        owner = self.owners[adapter_name]
        router = owner.moe_adapter_router[adapter_name]
        site = router.site
        if self.shares_any_input[adapter_name]:
            # the first to run decides, whichever was registered first; when it runs again it decides again
            if site in context.routings and context.deciders.get(site) != self.path:
                return context.routings[site]
            self._check_width(router, x, owner)
            context.deciders[site] = self.path
            return router(self._rows(x, context), context)
        shared, mode = context.shared.get(site), (context.is_open, torch.is_grad_enabled())
        if shared is not None and shared.serves(x, mode):
            return shared.routing
        routing = router(self._rows(x, context), context)
        context.shared[site] = SharedInput(InputIdentity(x), routing, mode)
        return routing

    def _check_width(self, router: nn.Module, x: Tensor, owner: RoutedLayer) -> None:
        if x.shape[-1] != owner.width_in and not hasattr(router.scorer, "constant_logits"):
            raise RoutingError(
                f"{self.path} runs first of the layers that share a router, and its input is {x.shape[-1]} wide; the router "
                f"reads inputs of {owner.width_in}, as {owner.path} has: leave {self.path} out with exclude_modules, or set "
                "router_sharing='block' or 'input'."
            )

    def _forget_spent(self, adapter_name: str, context: RoutingContext) -> None:
        """Outside a forward pass a decision serves each sibling once.

        There a second call with the same tensor is another recomputation, or a user who calls layers by hand and may
        have trained in between.
        """
        site = self.sites[adapter_name]
        spent = context.spent.setdefault(site, set())
        if self.path in spent:
            context.shared.pop(site, None)
            spent.clear()
        spent.add(self.path)

    def _rows(self, x: Tensor, context: RoutingContext) -> Tensor:
        """The rows of a flattened input again: a feed-forward block may hand its linears [T, D]."""
        shape = context.shape_BS
        if x.dim() == 2 and shape is not None and x.shape[0] == shape[0] * shape[1]:
            return x.view(*shape, x.shape[-1])
        return x

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its router.

        Args:
            adapter_name: its name.
        """
        super().delete_adapter(adapter_name)
        self.owners.pop(adapter_name, None)
        self.sites.pop(adapter_name, None)
        self.steps.pop(adapter_name, None)
        self.shares_any_input.pop(adapter_name, None)
        siblings = self.siblings.pop(adapter_name, [])
        if self in siblings:
            siblings.remove(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the active mixtures.

        Args:
            x: float [..., D].
            *args: passed to the base layer.
            **kwargs: passed to the base layer, but for `adapter_names`, the adapter of each row.

        Returns:
            float [..., O] in the base output's dtype.
        """
        rows = kwargs.pop("adapter_names", None) if kwargs else None
        if rows is not None:
            return self._by_rows(rows, x, *args, **kwargs)
        # plain attributes: a module's own lookup is slow enough to be seen at one token
        active = self._active_adapter
        active = [name for name in ([active] if isinstance(active, str) else active) if name in self.sites]
        if self._disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        context = self.state.context_for(self.place, x)
        if not context.is_open:
            for name in active:
                self._forget_spent(name, context)
        if len(active) == 1 and not args and not kwargs:
            step = self.steps.get(active[0])
            if step is not None:
                outputs = self._step(step, x, context)
                if outputs is not None:
                    return outputs
            fused = self._fused(active[0], x, context)
            if fused is not None:
                return fused
        base, x_TD = self.base_layer(x, *args, **kwargs), x.reshape(-1, x.shape[-1])
        out_TO = base.reshape(-1, base.shape[-1])
        for name in active:
            routing = self.routing(name, x, context)
            if routing.base_weight_T is not None:
                out_TO = out_TO * routing.base_weight_T[:, None].to(out_TO.dtype)
            out_TO = self.moe_adapter_bank[name](x_TD, routing, out_TO)
        return out_TO.view(*x.shape[:-1], out_TO.shape[-1])

    def _by_rows(self, rows: RowAdapters, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus, for each row, the mixture of its own adapter."""
        base = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return base
        context = self.state.context_for(self.place, x)
        x_BSD = self._rows(x, context)
        if x_BSD.dim() == 2 and context.shape_BS is None:
            # a model without sequences: one token a row
            x_BSD = x_BSD[:, None]
        if x_BSD.dim() < 3 or "experts" in self.path.split("."):
            raise RoutingError(
                f"adapter_names: {self.path} sees {list(x.shape)}, from which rows cannot be told. Leave it out of "
                "target_modules, or use one adapter a batch."
            )
        x_TD, out_TO = x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1])
        length = x_TD.shape[0] // max(1, x_BSD.shape[0])
        for name, (own_B, tokens_U) in rows.groups(x_BSD.shape[0], length, x.device).items():
            if name not in self.sites:
                continue
            routing = self.routing(name, x, context_of_rows(context, own_B, length)).for_tokens(tokens_U)
            out_UO = out_TO[tokens_U]
            if routing.base_weight_T is not None:
                out_UO = out_UO * routing.base_weight_T[:, None].to(out_UO.dtype)
            out_UO = self.moe_adapter_bank[name](x_TD[tokens_U], routing, out_UO)
            out_TO = out_TO.index_copy(0, tokens_U, out_UO)
        return out_TO.view(*x.shape[:-1], out_TO.shape[-1])

    def _step(self, step: DecodeStep, x: Tensor, context: RoutingContext) -> Tensor | None:
        """A token or two without a graph, where the group's tensors are known already."""
        site = self.sites[step.name]
        # a prompt in between leaves the step as it is: the next tokens find it again
        if x.shape != step.shape or torch.is_grad_enabled() or torch.compiler.is_compiling() or site in context.shared:
            return None
        if not step.is_current(x):
            self.steps.pop(step.name)
            return None
        routing = step.router(x, context)
        results = step(x, routing)
        if results is None or len(results) > 1:
            outputs = {} if results is None else dict(zip(step.others, results[1:], strict=True))
            context.shared[site] = SharedInput(InputIdentity(x), routing, (context.is_open, False), outputs)
        return None if results is None else results[0]

    def _fused(self, name: str, x: Tensor, context: RoutingContext) -> Tensor | None:
        """Base and mixture in one operator, for plain frozen linears; siblings are computed along with the first."""
        site = self.sites[name]
        shared = context.shared.get(site)
        done = None if shared is None else shared.outputs.pop(self.path, None)
        if not self._is_plain(name):
            return None
        if done is not None and shared.serves(x, (context.is_open, torch.is_grad_enabled())):
            return done
        layers = [self, *(layer for layer in self.siblings[name] if layer is not self and layer._joins(name, self))]
        banks, bases = [layer.moe_adapter_bank[name] for layer in layers], [layer.base_layer for layer in layers]
        weights, biases = [base.weight for base in bases], [base.bias for base in bases]
        x_TD = x.reshape(-1, x.shape[-1])
        results = self._gated(name, x, context, banks, x_TD, weights, biases)
        if results is None:
            routing = self.routing(name, x, context)
            if routing.base_weight_N is not None:
                return None
            if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.shares_any_input[name]):
                step = DecodeStep.of(layers, name, x, routing)
                if step is not None:
                    self.steps[name] = step
            results = banks[0].linear_group(banks, x_TD, weights, biases, routing)
            if results is None and len(layers) > 1:
                # no joint form: this one alone
                layers = layers[:1]
                results = banks[0].linear_group(banks[:1], x_TD, weights[:1], biases[:1], routing)
            if results is None:
                return None
        shaped = [result.view(*x.shape[:-1], result.shape[-1]) for result in results]
        if len(layers) > 1:
            outputs = context.shared[site].outputs
            outputs.update((layer.path, result) for layer, result in zip(layers[1:], shaped[1:], strict=True))
        return shaped[0]

    def _gated(
        self,
        name: str,
        x: Tensor,
        context: RoutingContext,
        banks: list[Any],
        x_TD: Tensor,
        weights: list[Tensor],
        biases: list[Tensor | None],
    ) -> list[Tensor] | None:
        """Decision and linears in one operator, for a first layer whose router and banks have one."""
        mode = (context.is_open, torch.is_grad_enabled())
        shared = context.shared.get(self.sites[name])
        if self.shares_any_input[name] or (shared is not None and shared.serves(x, mode)):
            return None
        router = self.owners[name].moe_adapter_router[name]
        parameters = router.gate_parameters(x, context)
        found = None if parameters is None else banks[0].gated_group(banks, x_TD, weights, biases, *parameters)
        if found is None:
            return None
        logits, ids, chosen, *results = found
        routing = router.decided(x, context, logits, ids, chosen)
        context.shared[self.sites[name]] = SharedInput(InputIdentity(x), routing, mode)
        return results

    def _is_plain(self, name: str) -> bool:
        """Whether a fused operator may read the tensors of the base and of a bank past their calls."""
        base = self._modules["base_layer"]
        return (
            type(base) is nn.Linear
            and is_untouched(base)
            and not base._parameters["weight"].requires_grad
            and is_untouched(self.moe_adapter_bank[name])
        )

    def _joins(self, name: str, first: RoutedLayer) -> bool:
        """Whether this layer's output may be computed together with a sibling's."""
        return (
            name in self.moe_adapter_bank
            and not self._disable_adapters
            and self._is_plain(name)
            and not self._forward_pre_hooks
            and self.active_adapters == first.active_adapters
            and self.base_layer.weight.device == first.base_layer.weight.device
            and self.training == first.training
        )

    def __repr__(self) -> str:
        return "moe_adapter." + super().__repr__()


def linear_widths(layer: nn.Module) -> tuple[int, int]:
    """Widths of a linear layer.

    Args:
        layer: `nn.Linear`, transformers' `Conv1D`, or a quantised linear that names its widths.

    Returns:
        (width in, width out).

    Raises:
        RoutingError: if it is none of these.
    """
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    kind = type(layer).__name__
    for name_in, name_out in _WIDTHS if kind not in _NO_LINEARS else ():
        width_in, width_out = getattr(layer, name_in, None), getattr(layer, name_out, None)
        if isinstance(width_in, int) and isinstance(width_out, int):
            return width_in, width_out
    raise RoutingError(
        f"cannot adapt a {kind}: routed adapters go on linear layers, which give one tensor W x + b"
        f"{_NO_LINEARS.get(kind, '')}. Leave it out of target_modules."
    )


# GPTQ's layers of older packages have the second pair
_WIDTHS = (("in_features", "out_features"), ("infeatures", "outfeatures"))
# layers of these names have widths, and do more than multiply
_NO_LINEARS = {
    "ColumnParallelLinear": " (Megatron's give a pair)",
    "RowParallelLinear": " (Megatron's give a pair)",
    "LayerNormLinear": " (TransformerEngine's normalises its input first)",
    "LayerNormMLP": " (TransformerEngine's is a whole feed-forward block)",
}
