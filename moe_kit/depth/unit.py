"""`DepthUnit`: the one child that a layer router adds to a routed module; it decides and has the decision carried out.

Keys of a saved adapter: `<module>.depth_unit.moe_depth_router.<adapter>....` and
`<module>.depth_unit.moe_depth_forecaster.<adapter>....`, where the module is a decoder layer, an attention or an MLP.

Shapes: B rows, S sequence, D width, N decisions (B rows or T = B*S tokens), A actions, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moe_kit.depth.config import APPROXIMATE, EXECUTE, SKIP, LayerRoutingConfig
from moe_kit.depth.execute import Call, Plan, run_rows
from moe_kit.depth.losses import Trace
from moe_kit.depth.routers import ActionRouter, FixedRouter, Forecaster, choose, pooled_logits
from moe_kit.depth.state import UNDECIDED, DepthState
from moe_kit.depth.tokens import decide_tokens, run_tokens
from moe_kit.errors import RoutingError
from moe_kit.routing.decision import Routing


class DepthUnit(nn.Module, BaseTunerLayer):
    """Router and forecaster of one routed module, for each adapter.

    Args:
        state: depth state of the model.
        kind: "layer", "attention" or "mlp".
        layer: index of the decoder layer.
        path: module path of the routed module.
        width: D, width of the residual stream.
    """

    adapter_layer_names = ("moe_depth_router", "moe_depth_forecaster")
    other_param_names = ()

    def __init__(self, state: DepthState, kind: str, layer: int, path: str, width: int) -> None:
        super().__init__()
        self.moe_depth_router = nn.ModuleDict()
        self.moe_depth_forecaster = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self.state, self.kind, self.layer, self.path, self.width = state, kind, layer, path, width
        self.configs: dict[str, LayerRoutingConfig] = {}
        # adapter -> the layer's unit whose token decision this sub-layer obeys; in a list, so that it is no child
        self.leaders: dict[str, list[DepthUnit]] = {}
        self._active_name: tuple[Any, str | None] = ((), None)

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
        self.state.units.get(adapter_name, {}).pop(self.column_of(), None)

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

    def column_of(self, units: str | None = None) -> int:
        """This unit's column in the action table."""
        if self.kind == "layer":
            return self.layer
        return 2 * self.layer + (self.kind == "mlp")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a layer route depends on the input.

        Raises:
            RoutingError: always.
        """
        raise RoutingError("layer routes depend on the input and cannot be merged into the base weights.")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

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
        config = self.configs[adapter]
        call = Call(module, forward, kwargs, self.kind, self.state.routing)
        if config.scope == "token":
            return self._run_tokens(adapter, config, call, x_BSD)
        carrier = self.state.request(call.cache)
        plans = carrier.notes.get(adapter)
        column = self.column_of()
        learning = self.learning(adapter)
        if plans is None:
            plans = carrier.notes[adapter] = {}
        plan = plans.get(column)
        if plan is None or learning or plan.forced is not self.state.forced:
            plan, gate_B = self._plan(adapter, config, call, x_BSD, carrier, learning)
            plans[column] = plan
            if gate_B is not None:
                return self._mix(adapter, call, x_BSD, gate_B)
        if self.state.routing.record is not None:
            self._register(adapter, carrier, x_BSD)
        if plan.uniform == EXECUTE:
            return call(x_BSD)
        return run_rows(call, x_BSD, plan, carrier, self._forecaster(adapter))

    def learning(self, adapter: str) -> bool:
        """Whether the router is being trained: else its decisions are hard, also while other adapters learn."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        router = self.moe_depth_router[adapter] if adapter in self.moe_depth_router else None  # noqa: SIM401
        return isinstance(router, ActionRouter) and router.score.last.weight.requires_grad

    def _forecaster(self, adapter: str) -> nn.Module | None:
        return self.moe_depth_forecaster[adapter] if adapter in self.moe_depth_forecaster else None  # noqa: SIM401

    # sequence scope

    def _plan(
        self, adapter: str, config: LayerRoutingConfig, call: Call, x_BSD: Tensor, carrier: Any, learning: bool
    ) -> tuple[Plan, Tensor | None]:
        """Decide, or read the decision of this request; the gate is given where training mixes instead of choosing."""
        state, batch, column = self.state, x_BSD.shape[0], self.column_of()
        table_BU = state.table(adapter, carrier, batch)
        known_B = table_BU[:, column]
        decided = UNDECIDED not in known_B.tolist()
        forced_B = state.forced_column(adapter, column, self.site(adapter), batch)
        logits_BA = None
        router = self.moe_depth_router[adapter]
        if isinstance(router, ActionRouter) and (learning or (forced_B is None and not decided)):
            logits_BA = self._logits(adapter, config, x_BSD)
        if decided:
            if forced_B is not None and not torch.equal(forced_B, known_B):
                raise RoutingError(
                    f"{self.path}: this request was decided as {known_B.tolist()} but {forced_B.tolist()} is forced now: "
                    "a cache continues with the routes it was filled with; use a fresh cache for other routes."
                )
            action_B = known_B
        else:
            action_B = forced_B if forced_B is not None else self._decide(adapter, config, logits_BA, batch, learning)
            if self.state.foreign and bool((action_B != EXECUTE).any()):
                raise RoutingError(
                    f"{self.path}: the cache holds tokens that were computed without these routes, so {action_B.tolist()} "
                    "cannot be obeyed: fill a fresh cache with the layer router active."
                )
            table_BU[:, column] = action_B
            if state.routing.record is None:
                self._register(adapter, carrier, x_BSD, logits_BA)
        self._check(adapter, call, action_B)
        gate_B = None
        if learning and logits_BA is not None:
            gate_B = self._trace(config, column, router, logits_BA, action_B, forced_B is not None)
        return Plan.of(action_B, x_BSD.device, state.forced), gate_B

    def _logits(self, adapter: str, config: LayerRoutingConfig, x_BSD: Tensor) -> Tensor:
        batch, length, _ = x_BSD.shape
        mask_BS = self.state.prompt_mask(batch, length, x_BSD.device)
        windows = None
        if config.pooling != "tokens":
            windows = self.state.windows(mask_BS, config.windows if config.pooling == "windows" else 1)
        return pooled_logits(self.moe_depth_router[adapter], x_BSD, mask_BS, config.pooling, windows)

    def _decide(
        self, adapter: str, config: LayerRoutingConfig, logits_BA: Tensor | None, batch: int, learning: bool
    ) -> Tensor:
        """Actions int64 [B] on the CPU: the one place where a host waits for the device, once a layer at prefill."""
        if config.router == "random":
            return self.state.random_actions(adapter, batch)[:, self.column_of()]
        router = self.moe_depth_router[adapter]
        if isinstance(router, FixedRouter):
            return router.action.cpu().expand(batch).clone()
        assert logits_BA is not None
        if learning and config.train_mode == "sample":
            index_B = torch.multinomial(logits_BA.detach().softmax(-1), 1)[:, 0]
            return torch.tensor(config.action_codes)[index_B.cpu()]
        return choose(logits_BA.detach(), config).cpu()

    def _trace(
        self,
        config: LayerRoutingConfig,
        column: int,
        router: nn.Module,
        logits_BA: Tensor,
        action_B: Tensor,
        forced: bool,
    ) -> Tensor | None:
        """Note the decision for losses; returns the gate where both branches are to be mixed."""
        execute = config.action_codes.index(EXECUTE)
        soft_B = logits_BA.softmax(-1)[:, execute]
        taken_B = action_B.to(logits_BA.device)
        codes_A = torch.tensor(config.action_codes, device=logits_BA.device)
        index_B1 = (taken_B[:, None] == codes_A).long().argmax(-1, keepdim=True)
        trace = Trace(
            column=column,
            logits_NA=logits_BA,
            gate_N=soft_B,
            mask_N=None,
            router=router,
            log_prob_N=logits_BA.log_softmax(-1).gather(-1, index_B1)[:, 0],
            execute=execute,
        )
        if self.state.routing.context.is_open:
            self.state.traces.append(trace)
        return soft_B if config.train_mode == "soft" and not forced else None

    def _mix(self, adapter: str, call: Call, x_BSD: Tensor, gate_B: Tensor) -> Any:
        """rho F(x) + (1 - rho) G(x), with G the forecaster or nothing."""
        gate = gate_B[:, None, None].to(x_BSD.dtype)
        forecaster = self._forecaster(adapter)
        other = call.identity(x_BSD) if forecaster is None else call.stand_in(x_BSD, forecaster)
        return call.wrap(gate * call.output(x_BSD) + (1 - gate) * other)

    def _check(self, adapter: str, call: Call, action_B: Tensor) -> None:
        """Refuse what cannot be exact.

        Raises:
            RoutingError: a skip that would leave the cache that sizes the masks empty; no forecaster to approximate.
        """
        actions = set(action_B.tolist())
        if APPROXIMATE in actions and self._forecaster(adapter) is None:
            raise RoutingError(
                f"{self.path}: action 3 (approximate) needs a forecaster, but forecaster_hidden is not set in the config."
            )
        empty = actions <= {SKIP, APPROXIMATE}
        if call.cache is not None and self.kind != "mlp" and self.layer in self.state.anchors and empty:
            raise RoutingError(
                f"{self.path} is the first layer of its attention kind: transformers sizes the masks and positions of "
                "all layers from its cache, which a skip would leave empty. Leave this layer unrouted (the default), "
                "or run without a cache."
            )

    def _register(self, adapter: str, carrier: Any, x_BSD: Tensor, logits_BA: Tensor | None = None) -> None:
        """Let recording and metrics see the decision."""
        context = self.state.routing.context
        if not context.is_open:
            return
        table_BU = self.state.table(adapter, carrier, x_BSD.shape[0])
        ids_B1 = table_BU[:, self.column_of(), None].to(x_BSD.device)
        routing = Routing(
            num_experts=4,
            sparse_ids_NK=ids_B1,
            sparse_weights_NK=torch.ones_like(ids_B1, dtype=torch.float32),
            logits_NE=None,
            num_sequences=x_BSD.shape[0],
        )
        context.registered.append((self.site(adapter), routing, _Quiet(self.training)))

    # token scope

    def _run_tokens(self, adapter: str, config: LayerRoutingConfig, call: Call, x_BSD: Tensor) -> Any:
        leader = self.leaders[adapter][0] if self.leaders[adapter] else self
        if leader is self:
            decision = decide_tokens(self, adapter, config, x_BSD)
            self.state.decisions[self.column_of()] = decision
            if self.kind == "layer":
                # attention and MLP of the layer obey
                return call(x_BSD)
        else:
            decision = self.state.decisions[leader.column_of()]
        return run_tokens(call, x_BSD, decision, self._forecaster(adapter))

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
            context.registered.append((self.site(adapter), routing, _Quiet(self.training)))


class _Quiet:
    """Stands for a router that has no balance losses."""

    losses: dict = {}

    def __init__(self, training: bool) -> None:
        self.training = training
