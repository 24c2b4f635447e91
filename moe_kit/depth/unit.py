"""`DepthUnit`: the one child that a layer router adds to a routed module; it decides and has the decision carried out.

Keys of a saved adapter: `<module>.depth_unit.moe_depth_router.<adapter>....` and
`<module>.depth_unit.moe_depth_forecaster.<adapter>....`, where the module is a decoder layer, an attention or an MLP.

Shapes: B rows, S sequence, D width, N decisions (B rows or T = B*S tokens), A actions, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.depth.config import EXECUTE, LayerRoutingConfig
from moe_kit.depth.execute import Call, run_rows
from moe_kit.depth.registered import Quiet
from moe_kit.depth.routers import ActionRouter, FixedRouter, Forecaster
from moe_kit.depth.rows import decide_rows
from moe_kit.depth.sparse import run_tokens
from moe_kit.depth.state import DepthState
from moe_kit.depth.tokens import decide_tokens
from moe_kit.errors import RoutingError
from moe_kit.hf.tuner_layer import FrozenStateLayer
from moe_kit.routing.decision import Routing


class DepthUnit(nn.Module, FrozenStateLayer):
    """Router and forecaster of one routed module, for each adapter.

    Args:
        state: depth state of the model.
        kind: "layer", "attention" or "mlp".
        layer: index of the decoder layer.
        slot: index of the layer's keys in a cache.
        path: module path of the routed module.
        width: D, width of the residual stream.
    """

    adapter_layer_names = ("moe_depth_router", "moe_depth_forecaster")
    other_param_names = ()

    def __init__(self, state: DepthState, kind: str, layer: int, slot: int, path: str, width: int) -> None:
        super().__init__()
        self.moe_depth_router = nn.ModuleDict()
        self.moe_depth_forecaster = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self.state, self.kind, self.layer, self.slot, self.path, self.width = state, kind, layer, slot, path, width
        # place in the action table: layers, or attention and MLP of each layer in turn
        self.column = layer if kind == "layer" else 2 * layer + (kind == "mlp")
        self.configs: dict[str, LayerRoutingConfig] = {}
        # adapter -> the layer's unit whose token decision this sub-layer obeys; in a list, so that it is no child
        self.leaders: dict[str, list[DepthUnit]] = {}
        self._active_name: tuple[Any, str | None] = ((), None)
        # the routed module; in a list, so that it is no child
        self.host: list[nn.Module] = []

    def update_layer(
        self, adapter_name: str, config: LayerRoutingConfig, router: nn.Module | None, leader: DepthUnit | None = None
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            router: a `FixedRouter`, or None = the learned router that the configuration asks for.
            leader: the unit whose decision this one obeys; it then has no router of its own.
        """
        self.configs[adapter_name] = config
        self.leaders[adapter_name] = [] if leader is None else [leader]
        if leader is None and config.router != "random":
            self.moe_depth_router[adapter_name] = router or ActionRouter(config, self.width)
        elif leader is None:
            self.moe_depth_router[adapter_name] = FixedRouter(EXECUTE)
        owns_forecast = leader is None or config.scope == "token"
        if config.forecaster_hidden and owns_forecast and not (self.kind == "layer" and config.scope == "token"):
            self.moe_depth_forecaster[adapter_name] = Forecaster(self.width, config.forecaster_hidden)
        self._active_name = ((), None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        super().delete_adapter(adapter_name)
        for table in (self.configs, self.leaders):
            table.pop(adapter_name, None)
        self.state.units.get(adapter_name, {}).pop(self.column, None)

    def active_name(self) -> str | None:
        """The layer-routing adapter in force here, or None: disabled, or only other kinds of adapter are active.

        Raises:
            RoutingError: if two are active.
        """
        if self._disable_adapters:
            return None
        active = self._active_adapter
        if self._active_name[0] is not active:
            names = [name for name in ([active] if isinstance(active, str) else active) if name in self.configs]
            if len(names) > 1:
                raise RoutingError(f"two layer routers are active at {self.path}: {names}; activate one of them.")
            self._active_name = (active, names[0] if names else None)
        name = self._active_name[1]
        return name if name in self.configs else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a layer route depends on the input.

        Raises:
            RoutingError: always.
        """
        raise RoutingError("layer routes depend on the input and cannot be merged into the base weights.")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this after loading; a unit wraps nothing, so the routed module says where, and dtypes stay."""
        if device is None:
            own = {id(parameter) for parameter in self.parameters()}
            host = (p for p in self.host[0].parameters() if id(p) not in own and not p.is_meta)
            device = next((parameter.device for parameter in host), None)
        for container in (self.moe_depth_router, self.moe_depth_forecaster):
            held = container[adapter_name] if adapter_name in container else None  # noqa: SIM401
            if held is not None and device is not None and not any(p.is_meta for p in held.parameters()):
                held.to(device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a route is no constant matrix."""
        return False

    def site(self, adapter: str) -> str:
        """Name under which this unit's decisions are recorded and replayed."""
        return f"{self.path}.depth.{adapter}"

    def run(self, module: nn.Module, forward: Callable, x_BSD: Tensor, kwargs: dict[str, Any]) -> Any:
        """The routed forward of the module.

        Args:
            module: the routed module.
            forward: the forward of its own class, unbound.
            x_BSD: float [B, S, D], its input.
            kwargs: its other arguments.

        Returns:
            What the module returns.

        Raises:
            RoutingError: if a decision cannot be obeyed exactly.
        """
        adapter = self.active_name()
        assert adapter is not None
        config, state = self.configs[adapter], self.state
        call = Call(module, forward, kwargs, self.kind, self.slot, state.routing)
        if config.scope == "token":
            return self._run_tokens(adapter, config, call, x_BSD)
        route = state.route(adapter, call.cache, x_BSD.shape[0], x_BSD.device)
        plan = route.plans.get(self.column)
        learning = self.learning(adapter)
        if plan is None or learning:
            plan, gate_B = decide_rows(self, adapter, call, x_BSD, route, learning)
            if gate_B is not None:
                return self.mix(adapter, call, x_BSD, gate_B)
        if plan.uniform == EXECUTE:
            return call(x_BSD)
        self._refuse_router_logits()
        return run_rows(call, x_BSD, plan, state.present.carrier, self.forecaster(adapter))

    def learning(self, adapter: str) -> bool:
        """Whether the router acts as in training: else its decisions are hard, also while other adapters learn.

        A pass without gradients acts so too if it scores whole sequences: a reference policy is the same function.
        """
        if not self.training:
            return False
        router = self.moe_depth_router[adapter] if adapter in self.moe_depth_router else None  # noqa: SIM401
        trainable = isinstance(router, ActionRouter) and router.scorer.last.weight.requires_grad
        if trainable and not torch.is_grad_enabled():
            # harmless in a pass without gradients, else the state refuses it
            self.state.present.blind = self
            return self.state.present.scores
        return trainable

    def _refuse_router_logits(self) -> None:
        if self.state.present.router_logits and self.kind != "attention":
            raise RoutingError(
                f"{self.path}: output_router_logits=True, but a token or row does not run this unit exactly once: the "
                "base model's balance loss needs the logits of every token in every layer. Call it with "
                "output_router_logits=False, or execute everything (set_budget, force_layers)."
            )

    def forecaster(self, adapter: str) -> nn.Module | None:
        """The module that stands in for this unit under an adapter, if it has one."""
        return self.moe_depth_forecaster[adapter] if adapter in self.moe_depth_forecaster else None  # noqa: SIM401

    def mix(self, adapter: str, call: Call, x_BSD: Tensor, gate_B: Tensor) -> Any:
        """rho F(x) + (1 - rho) G(x), with G the forecaster or nothing.

        Args:
            adapter: the adapter.
            call: the module's own forward.
            x_BSD: float [B, S, D].
            gate_B: float32 [B], rho.

        Returns:
            What the module returns.
        """
        gate = gate_B[:, None, None].to(x_BSD.dtype)
        forecaster = self.forecaster(adapter)
        other = call.identity(x_BSD) if forecaster is None else call.stand_in(x_BSD, forecaster)
        return call.wrap(gate * call.output(x_BSD) + (1 - gate) * other)

    # token scope

    def _run_tokens(self, adapter: str, config: LayerRoutingConfig, call: Call, x_BSD: Tensor) -> Any:
        leader = self.leaders[adapter][0] if self.leaders[adapter] else self
        if leader is self:
            decision = decide_tokens(self, adapter, config, x_BSD)
            self.state.present.decisions[self.column] = decision
            if self.kind == "layer":
                # attention and MLP of the layer obey
                return call(x_BSD)
        else:
            decision = self.state.present.decisions[leader.column]
        if not decision.blend and decision.running < decision.action_T.shape[0]:
            self._refuse_router_logits()
        return run_tokens(call, x_BSD, decision, self.forecaster(adapter))

    def register_tokens(self, adapter: str, action_T: Tensor, mask_T: Tensor | None) -> None:
        """Let recording and metrics see a token decision."""
        context = self.state.routing.context
        if context.is_open and (self.state.routing.record is not None or self.training):
            ids_T1 = action_T[:, None]
            routing = Routing(
                num_experts=4,
                sparse_ids_NK=ids_T1,
                sparse_weights_NK=torch.ones_like(ids_T1, dtype=torch.float32),
                mask_N=mask_T,
            )
            context.registered.append((self.site(adapter), routing, Quiet(self)))
