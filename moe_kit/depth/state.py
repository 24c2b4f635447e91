"""What the layer routers of one model share: the units in order, forced actions, and the decisions of a request.

A request is what one decision holds for: the life of a cache; without a cache one `generate` call; else one forward.
Its decisions are a `Route` in a `CarriedDecisions`. What can be looked up once a pass is looked up when it opens.

Shapes: B rows, U units (columns: layers, or attention and MLP of each layer in turn), S sequence.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_kit.depth.config import APPROXIMATE, EXECUTE, SKIP, LayerRoutingConfig
from moe_kit.depth.losses import LOSSES, how_to_teach, learns_from_model_loss
from moe_kit.depth.present import DepthPass
from moe_kit.depth.registered import Quiet, hand_over
from moe_kit.depth.route import Route, check_record, refuse_others, repeat_rows
from moe_kit.depth.windows import Windows
from moe_kit.errors import ConfigError, RoutingError
from moe_kit.hf.cache import CarriedDecisions, ensure_carrier
from moe_kit.hf.delivery import announced
from moe_kit.hf.hooks import HookedRouting
from moe_kit.routing.decision import Routing
from moe_kit.routing.scope import check_sequences

if TYPE_CHECKING:
    from moe_kit.depth.unit import DepthUnit

ATTRIBUTE = "moe_depth_state"
_SITE = "moe_depth."
# among the notes of a carrier: the adapter for which the routes of others were looked at
_ALONE = ("moe_depth", "alone")


class DepthState:
    """Shared by the layer-routing units of a model.

    Attributes:
        routing: routing state of the model (context, recording, replay).
        num_layers: decoder layers, L.
        anchors: layers whose caches size the masks of all others.
        units: adapter -> column -> unit.
        configs: adapter -> configuration.
        forced: int64 [B or 1, U] actions to obey, or None.
    """

    def __init__(self, routing: HookedRouting, num_layers: int, anchors: tuple[int, ...]) -> None:
        self.routing, self.num_layers, self.anchors = routing, num_layers, anchors
        self.units: dict[str, dict[int, DepthUnit]] = {}
        self.configs: dict[str, LayerRoutingConfig] = {}
        self.forced: Tensor | None = None
        self.warned_chunks = self.warned_untaught = False
        self._forced_columns: tuple[Any, list[list[int]]] = (None, [])
        self._checked: Any = None

    @property
    def present(self) -> DepthPass:
        """What belongs to the pass under way, to the one that is recomputed, or to the last one."""
        notes = self.routing.running().notes
        if ATTRIBUTE not in notes:
            notes[ATTRIBUTE] = DepthPass()
        return notes[ATTRIBUTE]

    def __deepcopy__(self, memo: dict) -> DepthState:
        fresh = DepthState(copy.deepcopy(self.routing, memo), self.num_layers, self.anchors)
        memo[id(self)] = fresh
        fresh.units = copy.deepcopy(self.units, memo)
        fresh.configs = copy.deepcopy(self.configs, memo)
        return fresh

    def __getstate__(self) -> dict:
        kept = ("routing", "num_layers", "anchors", "units", "configs")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.forced = None
        self.warned_chunks = self.warned_untaught = False
        self._forced_columns, self._checked = (None, []), None

    def num_columns(self, adapter: str) -> int:
        """U: columns of the action table of an adapter."""
        return self.num_layers if self.configs[adapter].units == "layer" else 2 * self.num_layers

    def active(self) -> str:
        """Name of the one active layer-routing adapter.

        Raises:
            RoutingError: if none is active or the model has none.
        """
        adapter = self._active()
        if adapter is None:
            raise RoutingError(
                f"no layer-routing adapter is active; the model has {sorted(self.units)}: call set_adapter with one of them."
            )
        return adapter

    def _active(self) -> str | None:
        for adapter, units in self.units.items():
            if any(unit.active_name() == adapter for unit in units.values()):
                return adapter
        return None

    def reads_prompt(self) -> bool:
        """Whether the next request's routes will be decided by routers that read its prompt."""
        adapter = self._active()
        if adapter is None or self.forced is not None or self.routing.overrides.get("replay") is not None:
            return False
        return self.configs[adapter].scope == "sequence" and self.configs[adapter].router != "fixed"

    # a pass

    def open(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Start a forward pass.

        Args:
            module: what is called: the model, or a part of it on its own.
            arguments: its arguments by name.

        Raises:
            RoutingError: if the pass goes on with a cache of other rows, or is asked for other routes than its cache has,
                or the cache has routes of an adapter that is not active.
        """
        present = self.routing.current.notes[ATTRIBUTE] = DepthPass(under_way=module)
        generation = self.routing.generation
        present.scores = generation is None and arguments.get("past_key_values") is None
        if generation is not None:
            # without a cache the decisions hold for the call of `generate`
            before = generation.notes.get(ATTRIBUTE)
            if before is not None and before.carrier.sites:
                present.carrier, present.row_keys_B = before.carrier, before.row_keys_B
            generation.notes[ATTRIBUTE] = present
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        adapter = self._active()
        present.router_logits = adapter is not None and _asks_router_logits(module, arguments)
        self._board(adapter, arguments.get("past_key_values"))
        if tokens is not None and adapter is not None:
            self._continue(adapter, tokens.shape[0])
        if present.row_keys_B is None and any(config.router == "random" for config in self.configs.values()):
            context = self.routing.context
            present.row_keys_B = _row_keys(arguments, context.prompt_mask_BS, context.mask_BS)

    def _board(self, adapter: str | None, cache: Any) -> None:
        """Put a carrier on the cache of this pass before the pass writes to it."""
        present = self.present
        if cache is None:
            return
        present.cache = cache
        carrier = present.carrier = ensure_carrier(cache, self.num_layers)
        own = None if adapter is None else _SITE + adapter
        if own is not None and own not in carrier.sites:
            # what other routes computed cannot be continued on these
            present.foreign = int(cache.get_seq_length()) > 0
        # once for each adapter that goes on with the cache, not at every step
        if carrier.notes.get(_ALONE, ()) != own:
            refuse_others(carrier.sites, _SITE, own)
            carrier.notes[_ALONE] = own

    def _continue(self, adapter: str, batch: int) -> None:
        """Check once, not at every unit, that the pass may go on with its request, and note what just executes."""
        replay = self.routing.context.replay
        if replay is not None and replay is not self._checked:
            check_record(replay, adapter, self.units[adapter], self.configs[adapter])
            self._checked = replay
        route = self._find(adapter, self.present.carrier)
        if route is None:
            return
        route.check_rows(batch)
        units = self.units[adapter]
        asked = self._asked()
        if asked is not None and asked is not route.agreed:
            if self.forced is None or not route.obeys(self.forced):
                # unit by unit, to say which one is asked for something else
                route.agree(
                    (u.path, c, self.forced_column(adapter, c, u.site(adapter), batch)) for c, u in units.items()
                )
            route.agreed = asked
        if route.executing is not None and self.routing.record is None and not torch.is_grad_enabled():
            self.present.executing, self.present.skipping = route.executing, route.skipping

    def _asked(self) -> Any:
        """What the user forces or replays, as an object to be told apart by identity."""
        return self.routing.context.replay if self.forced is None else self.forced

    def before_close(self) -> None:
        """The model has run: let recording, metrics and the trainer see what was decided.

        Raises:
            ConfigError: if a router that is to learn decided without a graph (reentrant checkpointing).
        """
        present = self.present
        if present.blind is not None and torch.is_grad_enabled():
            raise ConfigError(
                f"{present.blind.path}: the layer router decided without a graph in a training pass and would not learn: "
                "gradient checkpointing is reentrant. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        if present.used is not None:
            self._register(*present.used)
        if present.traces and torch.is_grad_enabled():
            hand_over(self.routing.context, self.losses())
            self._look_for_a_teacher(self.configs[self.active()])

    def _look_for_a_teacher(self, config: LayerRoutingConfig) -> None:
        """Refuse to train layer routers in vain; where other parameters learn beside them, say it once."""
        if learns_from_model_loss(config):
            if config.router == "capacity" and not config.losses.get("capacity"):
                self._warn_untaught(
                    "the causal predictor of the layer routers has no loss: give losses={'capacity': 0.01}"
                )
            return
        which = "" if config.preset is None else f" of preset {config.preset!r}"
        what = f"the layer routers{which} {how_to_teach(config)}"
        under_way = self.present.under_way
        assert under_way is not None
        others = (n for n, p in under_way.named_parameters() if p.requires_grad and "moe_depth_" not in n)
        if not self.warned_untaught and next(others, None) is None:
            self.routing.untaught = f"{what}."
        else:
            self._warn_untaught(what)

    def _warn_untaught(self, what: str) -> None:
        if not self.warned_untaught:
            self.warned_untaught = True
            warnings.warn(f"moe_kit: {what}.", stacklevel=2)

    def _register(self, adapter: str, route: Route, device: torch.device) -> None:
        """Show the route of a request, with one copy to the device for all units."""
        context, units, present = self.routing.context, self.units[adapter], self.present
        route.settle(units)
        if not context.is_open or not (present.decided_now or present.traces or self.routing.record is not None):
            return
        ids_BU = route.table_BU.to(device)
        ones_B1 = torch.ones(route.batch, 1, device=device)
        for column, unit in units.items():
            if column in route.plans:
                routing = Routing(
                    num_experts=4,
                    sparse_ids_NK=ids_BU[:, column, None],
                    sparse_weights_NK=ones_B1,
                    num_sequences=route.batch,
                )
                context.registered.append((unit.site(adapter), routing, Quiet(unit)))

    def close(self) -> None:
        """End the forward pass; a cache is not kept alive by it."""
        present = self.present
        present.cache = present.used = present.under_way = None
        self.routing.untaught = None
        # recomputation for a backward pass asks the units
        present.executing = present.skipping = frozenset()

    # a request

    def route(self, adapter: str, cache: Any, batch: int, device: torch.device) -> Route:
        """The route of a call with this cache (None without); made on first use.

        Raises:
            RoutingError: if the request has other rows.
        """
        present = self.present
        if cache is not None and present.cache is not cache:
            # a cache that the user gave has its carrier since the pass began; one that the model made was empty then
            present.cache, present.carrier = cache, ensure_carrier(cache, self.num_layers)
        route = self._find(adapter, present.carrier)
        if route is None:
            route = present.carrier.notes[adapter] = Route.undecided(batch, self.num_columns(adapter))
            route.agreed = self._asked()
            present.carrier.sites[_SITE + adapter] = route.table_BU
        route.check_rows(batch)
        present.used = (adapter, route, device)
        return route

    @staticmethod
    def _find(adapter: str, carrier: CarriedDecisions) -> Route | None:
        route = carrier.notes.get(adapter)
        table_BU = carrier.sites.get(_SITE + adapter)
        if route is None and table_BU is not None:
            route = carrier.notes[adapter] = Route(table_BU)
        return route

    def decided(self, adapter: str) -> Tensor | None:
        """Actions int64 [B, U] of the last request, on the CPU; None before any."""
        return self.present.carrier.sites.get(_SITE + adapter)

    def forced_column(self, adapter: str, column: int, site: str, batch: int) -> list[int] | None:
        """Action of each row that the user forces or replays at a unit, or None."""
        if self.forced is not None:
            if self._forced_columns[0] is not self.forced:
                self._forced_columns = (self.forced, self.forced.t().tolist())
            return repeat_rows(self._forced_columns[1][column], batch)
        replay = self.routing.context.replay
        if replay is not None and site in replay:
            return repeat_rows(replay[site][:, 0].tolist(), batch)
        return None

    def pooling(
        self, config: LayerRoutingConfig, batch: int, length: int, device: torch.device
    ) -> tuple[Tensor, Windows | None]:
        """Tokens that a decision may read, bool [B, S], and their windows; made once a pass and device."""
        count = None if config.pooling == "tokens" else config.windows if config.pooling == "windows" else 1
        key = (count, batch, length, device)
        pooling = self.present.pooling
        if key not in pooling:
            check_sequences(self.routing.context, "a layer router that reads the prompt")
            mask_T = self.routing.context.prompt_mask_T(batch, length)
            mask_BS = torch.ones(batch, length, dtype=torch.bool) if mask_T is None else mask_T.view(batch, length)
            mask_BS = mask_BS.to(device)
            pooling[key] = (mask_BS, None if count is None else Windows(mask_BS, count))
        return pooling[key]

    def random_actions(self, adapter: str, route: Route) -> list[list[int]]:
        """Actions, by column and row, of the random baseline: round(rate * n) of the n routed units, drawn by prompt.

        The draw depends on the prompt's tokens and the seed only, so that it is the same in any batch.
        """
        if route.drawn is None:
            config, columns = self.configs[adapter], sorted(self.units[adapter])
            keys_B = self.present.row_keys_B
            keys = [0] if keys_B is None else keys_B.tolist()
            count = round(config.budget * len(columns))
            away = SKIP if "skip" in config.actions else APPROXIMATE
            route.drawn = [[EXECUTE] * route.batch for _ in range(self.num_columns(adapter))]
            for row, key in enumerate(repeat_rows(keys, route.batch)):
                generator = torch.Generator().manual_seed((config.seed * 1_000_003 + key) % (2**63))
                for index in torch.randperm(len(columns), generator=generator)[:count].tolist():
                    route.drawn[columns[index]][row] = away
        return route.drawn

    def losses(self) -> dict[str, tuple[float, Tensor]]:
        """Name -> (coefficient, unscaled loss) of the last training pass."""
        traces = self.present.traces
        if not traces:
            return {}
        config = self.configs[self.active()]
        return {
            name: (coefficient, LOSSES[name](traces, config.target_rate)) for name, coefficient in config.losses.items()
        }


def _asks_router_logits(module: nn.Module, arguments: dict[str, Any]) -> bool:
    if announced(module):
        # a dense base that only says so for trainers
        return False
    asked = arguments.get("output_router_logits")
    return bool(getattr(getattr(module, "config", None), "output_router_logits", False) if asked is None else asked)


def _row_keys(arguments: dict[str, Any], prompt_BS: Tensor | None, mask_BS: Tensor | None) -> Tensor | None:
    """A number for each row that depends on its prompt tokens only, int64 [B] on the CPU."""
    tokens = arguments.get("input_ids")
    if tokens is None:
        return None
    mask_BS = prompt_BS if prompt_BS is not None else mask_BS
    mask_BS = torch.ones_like(tokens, dtype=torch.bool) if mask_BS is None else mask_BS
    rank_BS = mask_BS.long().cumsum(1)
    return ((tokens.long() + 1) * (rank_BS * 7919 + 104729) * mask_BS).sum(1).remainder(2**31 - 1).cpu()


def find_depth_state(model: nn.Module) -> DepthState:
    """The depth state of a model or of a module inside it.

    Raises:
        RoutingError: if the model has no layer routers.
    """
    for module in model.modules():
        state = module.__dict__.get(ATTRIBUTE)
        if state is not None:
            return state
    raise RoutingError("this model has no layer routers: wrap it with get_peft_model(model, LayerRoutingConfig(...)).")
