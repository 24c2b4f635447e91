"""What the layer routers of one model share: the units in order, forced actions, and the decisions of a request.

A request is what one decision holds for: the life of a cache; without a cache one `generate` call; else one forward.
Decisions are kept as one CPU table [B, U] (0 skip, 1 execute, 2 repeat, 3 approximate, -1 not decided yet) in a
`CarriedDecisions`, so that obeying one while decoding waits for no device.

Shapes: B rows, U units (columns: layers, or attention and MLP of each layer in turn), S sequence.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_kit.depth.config import APPROXIMATE, EXECUTE, SKIP, LayerRoutingConfig
from moe_kit.depth.losses import LOSSES, Trace
from moe_kit.depth.routers import window_matrix
from moe_kit.errors import RoutingError
from moe_kit.hf.cache import CarriedDecisions, ensure_carrier, mask_diagonal
from moe_kit.hf.hooks import attach, loss_share
from moe_kit.routing.state import ModelRouting

if TYPE_CHECKING:
    from moe_kit.depth.tokens import TokenDecision
    from moe_kit.depth.unit import DepthUnit

ATTRIBUTE = "moe_depth_state"
_HOOKS = "moe_depth_hooks"
_SITE = "moe_depth."
UNDECIDED = -1


class DepthState:
    """Shared by the layer-routing units of a model.

    Attributes:
        routing: routing state of the model (context, recording, replay).
        num_layers: decoder layers, L.
        anchors: layers whose caches size the masks of all others.
        units: adapter -> column -> unit.
        configs: adapter -> configuration.
        forced: int64 [B or 1, U] actions to obey, or None.
        carrier: decisions of the present request.
        traces: what units decided in the present training pass.
        foreign: True if the cache of the present pass was filled without layer routes.
        decisions: column -> what the tokens of the present pass do there (token scope).
    """

    def __init__(self, routing: ModelRouting, num_layers: int, anchors: tuple[int, ...]) -> None:
        self.routing, self.num_layers, self.anchors = routing, num_layers, anchors
        self.units: dict[str, dict[int, DepthUnit]] = {}
        self.configs: dict[str, LayerRoutingConfig] = {}
        self.forced: Tensor | None = None
        self.carrier = CarriedDecisions()
        self.traces: list[Trace] = []
        self.decisions: dict[int, TokenDecision] = {}
        self.row_keys_B: Tensor | None = None
        self.in_generate = False
        self.prompt_width: int | None = None
        self.foreign = False
        self._cache: Any = None
        self._windows: dict[tuple, Any] = {}

    def __deepcopy__(self, memo: dict) -> DepthState:
        fresh = DepthState(copy.deepcopy(self.routing, memo), self.num_layers, self.anchors)
        memo[id(self)] = fresh
        fresh.units = copy.deepcopy(self.units, memo)
        fresh.configs = copy.deepcopy(self.configs, memo)
        return fresh

    def __getstate__(self) -> dict:
        # decisions of a finished request are not worth keeping, and traces hold graph tensors
        return {
            **self.__dict__,
            "carrier": CarriedDecisions(),
            "traces": [],
            "decisions": {},
            "_cache": None,
            "_windows": {},
            "row_keys_B": None,
            "forced": None,
        }

    def num_columns(self, adapter: str) -> int:
        """U: columns of the action table of an adapter."""
        return self.num_layers if self.configs[adapter].units == "layer" else 2 * self.num_layers

    def active(self) -> str:
        """Name of the one active layer-routing adapter.

        Raises:
            RoutingError: if none is active or the model has none.
        """
        for adapter, units in self.units.items():
            if any(unit.active_name() == adapter for unit in units.values()):
                return adapter
        raise RoutingError(
            f"no layer-routing adapter is active; the model has {sorted(self.units)}: call set_adapter with one of them."
        )

    def open(self, arguments: dict[str, Any]) -> None:
        """Start a forward pass."""
        self.traces, self.decisions, self._windows, self._cache = [], {}, {}, None
        if not (self.in_generate and self.carrier.sites):
            self.carrier = CarriedDecisions()
            self.row_keys_B = None

        self._board(arguments.get("past_key_values"))
        self._read_mask(arguments)
        if self.row_keys_B is None and any(config.router == "random" for config in self.configs.values()):
            self.row_keys_B = _row_keys(arguments, self.routing.context.prompt_mask_BS, self.routing.context.mask_BS)

    def _read_mask(self, arguments: dict[str, Any]) -> None:
        """Find padding where the attention mask is a prepared one; only at prefill, where decisions are made."""
        context, tokens = self.routing.context, arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or tokens.shape[1] == 1:
            return
        if context.mask_BS is None:
            self._read_prepared_mask(arguments, tokens)
        width = self.prompt_width
        if self.in_generate and width is not None and tokens.shape[1] > width and context.prompt_mask_BS is None:
            # assisted decoding appends its candidates to the prompt
            columns_S = torch.arange(tokens.shape[1], device=tokens.device) < width
            prompt_BS = columns_S.expand(tokens.shape[0], -1)
            context.prompt_mask_BS = prompt_BS if context.mask_BS is None else prompt_BS & context.mask_BS

    def _read_prepared_mask(self, arguments: dict[str, Any], tokens: Tensor) -> None:
        context = self.routing.context
        cache = arguments.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask_BS = mask_diagonal(arguments.get("attention_mask"), tuple(tokens.shape[:2]), past)
        if mask_BS is not None:
            context.mask_BS = mask_BS
            if context.prompt_mask_BS is not None:
                context.prompt_mask_BS = context.prompt_mask_BS & mask_BS

    def _board(self, cache: Any) -> None:
        """Put a carrier on the cache of this pass before the pass writes to it."""
        self.foreign = False
        if cache is None:
            return
        carrier = ensure_carrier(cache, self.num_layers)
        if self.units and not any(site.startswith(_SITE) for site in carrier.sites):
            # what other routes computed cannot be continued on these
            self.foreign = int(cache.get_seq_length()) > 0

    def close(self) -> None:
        """End the forward pass; a cache is not kept alive by it."""
        self._cache = None

    def request(self, cache: Any) -> CarriedDecisions:
        """The decisions that hold for a call with this cache (None without)."""
        if cache is None:
            return self.carrier
        if self._cache is cache:
            return self.carrier
        # a cache that the user gave has its carrier since the pass began; one that the model made was empty then
        self._cache, self.carrier = cache, ensure_carrier(cache, self.num_layers)
        return self.carrier

    def table(self, adapter: str, carrier: CarriedDecisions, batch: int) -> Tensor:
        """Actions int64 [B, U] of a request, on the CPU; made on first use.

        Raises:
            RoutingError: if the request has other rows.
        """
        site = _SITE + adapter
        table_BU = carrier.sites.get(site)
        if table_BU is None:
            table_BU = torch.full((batch, self.num_columns(adapter)), UNDECIDED)
            carrier.sites[site] = table_BU
        if table_BU.shape[0] != batch:
            raise RoutingError(
                f"the cache carries routes of {table_BU.shape[0]} rows but the forward pass has {batch}: use one cache "
                "for one batch, or expand it with cache.batch_repeat_interleave."
            )
        return table_BU

    def forced_column(self, adapter: str, column: int, site: str, batch: int) -> Tensor | None:
        """Actions that the user forces or replays at a unit, int64 [B] on the CPU, or None."""
        if self.forced is not None:
            return _repeat_rows(self.forced[:, column], batch)
        replay = self.routing.context.replay
        if replay is not None and site in replay:
            return _repeat_rows(replay[site][:, 0].cpu(), batch)
        return None

    def prompt_mask(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Tokens that a decision may read, bool [B, S]; made once a pass."""
        key = ("mask", batch, length, device)
        if key not in self._windows:
            mask_T = self.routing.context.prompt_mask_T(batch, length)
            ones = torch.ones(batch, length, dtype=torch.bool, device=device)
            self._windows[key] = ones if mask_T is None else mask_T.view(batch, length).to(device)
        return self._windows[key]

    def windows(self, mask_BS: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`window_matrix` of this pass, made once for all units."""
        key = (count, tuple(mask_BS.shape), mask_BS.device)
        if key not in self._windows:
            self._windows[key] = window_matrix(mask_BS, count)
        return self._windows[key]

    def random_actions(self, adapter: str, batch: int) -> Tensor:
        """Actions int64 [B, U] of the random baseline: round(rate * n) of the n routed units, drawn by each prompt.

        The draw depends on the prompt's tokens and the seed only, so that it is the same in any batch.
        """
        config, columns = self.configs[adapter], sorted(self.units[adapter])
        actions = torch.full((batch, self.num_columns(adapter)), EXECUTE)
        keys_B = torch.zeros(batch, dtype=torch.long) if self.row_keys_B is None else self.row_keys_B
        count = round(config.budget * len(columns))
        for row, key in enumerate(_repeat_rows(keys_B, batch).tolist()):
            generator = torch.Generator().manual_seed((config.seed * 1_000_003 + key) % (2**63))
            picked = torch.randperm(len(columns), generator=generator)[:count].tolist()
            actions[row, [columns[index] for index in picked]] = SKIP if "skip" in config.actions else APPROXIMATE
        return actions

    def losses(self) -> dict[str, tuple[float, Tensor]]:
        """Name -> (coefficient, unscaled loss) of the last training pass."""
        if not self.traces:
            return {}
        config = self.configs[self.active()]
        return {
            name: (coefficient, LOSSES[name](self.traces, config.target_rate))
            for name, coefficient in config.losses.items()
        }


def _repeat_rows(value: Tensor, batch: int) -> Tensor:
    """Rows of a per-row value for a batch; a batch that is a multiple repeats each row (beams).

    Raises:
        RoutingError: if the batch is no multiple of the rows.
    """
    rows = value.shape[0]
    if rows == batch:
        return value
    if rows == 0 or batch % rows:
        raise RoutingError(
            f"actions for {rows} rows were given but the forward pass has {batch}: give one row for all, or one for "
            "each batch row (a batch that is a multiple repeats each row, for beams)."
        )
    return value.repeat_interleave(batch // rows, dim=0)


def _row_keys(arguments: dict[str, Any], prompt_BS: Tensor | None, mask_BS: Tensor | None) -> Tensor | None:
    """A number for each row that depends on its prompt tokens only, int64 [B] on the CPU."""
    tokens = arguments.get("input_ids")
    if tokens is None:
        return None
    mask_BS = prompt_BS if prompt_BS is not None else mask_BS
    mask_BS = torch.ones_like(tokens, dtype=torch.bool) if mask_BS is None else mask_BS
    rank_BS = mask_BS.long().cumsum(1)
    return ((tokens.long() + 1) * (rank_BS * 7919 + 104729) * mask_BS).sum(1).remainder(2**31 - 1).cpu()


def attach_depth(model: nn.Module, num_layers: int, anchors: tuple[int, ...]) -> DepthState:
    """Attach depth state and hooks to an inner Hugging Face model; doing it twice changes nothing.

    Args:
        model: the model that receives `input_ids`, `attention_mask` and `labels`.
        num_layers: its decoder layers.
        anchors: layers that size the masks.
    """
    routing = attach(model)
    state = model.__dict__.get(ATTRIBUTE)
    if state is None:
        state = model.__dict__[ATTRIBUTE] = DepthState(routing, num_layers, anchors)
    if _HOOKS not in model.__dict__:
        model.__dict__[_HOOKS] = (
            model.register_forward_pre_hook(_open, with_kwargs=True),
            model.register_forward_hook(_close, with_kwargs=True, always_call=True),
        )
        if hasattr(type(model), "generate"):
            model.__dict__["generate"] = functools.partial(_generate, model)
    return state


def detach_depth(model: nn.Module) -> None:
    """Remove what `attach_depth` added; doing it twice changes nothing."""
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()
    model.__dict__.pop(ATTRIBUTE, None)
    model.__dict__.pop("generate", None)


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


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`generate` with one decision for the whole call, also without a cache."""
    state: DepthState = model.__dict__[ATTRIBUTE]
    generation_config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    chunk = kwargs.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None))
    if chunk is not None:
        _warn_chunks(chunk)
    # a compiled decoding step cannot branch on a route
    if kwargs.get("generation_config") is not None:
        kwargs["generation_config"] = copy.copy(kwargs["generation_config"])
        kwargs["generation_config"].disable_compile = True
    else:
        kwargs.setdefault("disable_compile", True)
    prompt = next(
        (kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(name) is not None), None
    )
    prompt = args[0] if args and prompt is None else prompt
    previous, state.in_generate = (state.in_generate, state.prompt_width), True
    state.prompt_width = None if prompt is None else prompt.shape[1]
    state.carrier = CarriedDecisions()
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        state.in_generate, state.prompt_width = previous


@functools.cache
def _warn_chunks(chunk: int) -> None:
    warnings.warn(
        f"moe_kit: with prefill_chunk_size={chunk} a sequence's layer routes are decided on its first chunk.",
        stacklevel=3,
    )


def _open(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    module.__dict__[ATTRIBUTE].open(_named(module, args, kwargs))


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    return {**dict(zip(_names(type(module)), args)), **kwargs} if args else kwargs


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _close(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    state: DepthState = module.__dict__[ATTRIBUTE]
    state.close()
    if output is None or not state.traces or not (module.training and torch.is_grad_enabled()):
        return None
    losses = state.losses()
    state.routing.context.closed_losses.update({name: loss for name, (_, loss) in losses.items()})
    terms = [coefficient * loss for coefficient, loss in losses.values() if coefficient]
    loss = getattr(output, "loss", None)
    if loss is None or not terms:
        return None
    share = loss_share(module, _named(module, args, kwargs))
    output.loss = loss + share * torch.stack(terms).sum().to(loss.device)
    return output
