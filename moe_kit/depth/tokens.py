"""Per-token decisions: which tokens run an attention or an MLP, and how to run only those.

Keys and values of a skipped token are still written, so every later token sees it and every cache is whole:

    MLP         token_gather, the MLP on the short batch, token_scatter
    attention   keys and values for all tokens, then queries, attention and output for the kept ones only
    decode      no token runs: only keys and values are computed

Source of the policy: SkipGPT arXiv 2506.04179, FlexiDepth arXiv 2503.23798; a whole block a token (Mixture-of-Depths)
is its attention and its MLP obeying one decision.

Shapes: B rows, S sequence, T = B*S tokens, D width, N kept tokens, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_kit.depth.config import APPROXIMATE, EXECUTE, LayerRoutingConfig
from moe_kit.depth.execute import Call
from moe_kit.depth.losses import Trace
from moe_kit.depth.narrow import running_tokens
from moe_kit.depth.routers import choose
from moe_kit.errors import RoutingError
from moe_kit.hf.cache import CacheView, KeysGiven, KeysWritten

if TYPE_CHECKING:
    from moe_kit.depth.unit import DepthUnit


@dataclass(frozen=True)
class TokenDecision:
    """What the tokens of a pass do at one unit.

    Attributes:
        action_T: int64 [T], action codes.
        gate_T: float32 [T], weight of executing; None = 1 where executed and 0 elsewhere.
        blend: compute both branches for every token and mix them by the gate (training with Gumbel noise).
        run: True if every token executes, False if none does, None if they differ.
        approximate: True if some token is approximated.
        trace: where losses look, in training.
        batch: rows, B.
    """

    action_T: Tensor
    gate_T: Tensor | None
    blend: bool
    run: bool | None
    approximate: bool
    trace: Trace | None = None
    batch: int = 1


def decide_tokens(unit: DepthUnit, adapter: str, config: LayerRoutingConfig, x_BSD: Tensor) -> TokenDecision:
    """Decide for each token.

    Args:
        unit: the unit.
        adapter: its adapter.
        config: the adapter's configuration.
        x_BSD: float [B, S, D], the unit's input.

    Returns:
        The decision; registered for recording and, in training, for losses.

    Raises:
        RoutingError: if a forced decision does not fit.
    """
    batch, length, width = x_BSD.shape
    state, column = unit.state, unit.column
    learning = unit.learning(adapter)
    x_TD = x_BSD.reshape(-1, width)
    mask_T = state.routing.context.mask_T(batch, length)
    router = unit.moe_depth_router[adapter]
    forced_T = _forced(unit, adapter, column, batch, length)
    execute = config.action_codes.index(EXECUTE)
    logits_TA = predicted_TA = target_T = gate_T = None
    blend = False
    if forced_T is None or learning:
        logits_TA = router.scorer(x_TD)
    if learning and config.router == "capacity":
        predicted_TA = router.predict(x_TD)
        target_T = _top_tokens(logits_TA[:, execute], mask_T, batch, 1 - config.target_rate)
        action_T = torch.where(target_T, EXECUTE, _other(config))
        gate_T = logits_TA.softmax(-1)[:, execute]
    elif forced_T is None:
        action_T = choose(router.predict(x_TD) if config.router == "capacity" else logits_TA, config)
        if config.branch_scale != "none" or learning:
            gate_T = logits_TA.softmax(-1)[:, execute]
        if learning and config.train_mode == "gumbel":
            noisy_TA = functional.gumbel_softmax(logits_TA, tau=config.tau, hard=True)
            gate_T, blend = noisy_TA[:, execute], True
            action_T = torch.where(gate_T.detach() > 0.5, EXECUTE, _other(config))
    if forced_T is not None:
        action_T, gate_T, blend = forced_T.to(x_BSD.device), None, False
    trace = None
    if learning and logits_TA is not None:
        weight_T = logits_TA.softmax(-1)[:, execute] if gate_T is None else gate_T
        trace = Trace(column, logits_TA, weight_T, mask_T, router, None, target_T, predicted_TA, None, execute)
        if state.routing.context.is_open:
            state.traces.append(trace)
    run_T = action_T == EXECUTE
    # one read on the host: it is what lets a token really skip
    some, every, approximate = torch.stack([run_T.any(), run_T.all(), (action_T == APPROXIMATE).any()]).tolist()
    unit.register_tokens(adapter, action_T, mask_T)
    scaled = gate_T if blend or config.branch_scale != "none" else None
    if scaled is not None and config.branch_scale == "straight_through" and not blend:
        # value 1 on the branch that was taken, gradient of the gate
        scaled = scaled - scaled.detach() + run_T if learning else None
    return TokenDecision(action_T, scaled, blend, True if every else None if some else False, approximate, trace, batch)


def _other(config: LayerRoutingConfig) -> int:
    return next(code for code in config.action_codes if code != EXECUTE)


def _forced(unit: DepthUnit, adapter: str, column: int, batch: int, length: int) -> Tensor | None:
    """Forced or replayed actions, int64 [T]."""
    replay = unit.state.routing.context.replay
    site = unit.site(adapter)
    if unit.state.forced is None and replay is not None and site in replay:
        ids_T = replay[site][:, 0]
        if ids_T.shape[0] != batch * length:
            raise RoutingError(
                f"the replayed record has {ids_T.shape[0]} tokens at {site}, the forward pass {batch * length}: "
                "replay on the same batch that was recorded."
            )
        return ids_T
    forced = unit.state.forced_column(adapter, column, site, batch)
    return None if forced is None else torch.tensor(forced).repeat_interleave(length)


def _top_tokens(score_T: Tensor, mask_T: Tensor | None, batch: int, share: float) -> Tensor:
    """The best ceil(share * n) of the n real tokens of each row, bool [T]."""
    score_BS = score_T.detach().view(batch, -1)
    mask_BS = torch.ones_like(score_BS, dtype=torch.bool) if mask_T is None else mask_T.view(batch, -1)
    score_BS = score_BS.masked_fill(~mask_BS, -math.inf)
    # the tolerance keeps 0.1 * 30 at 3 tokens; equal scores go to the earlier token
    count_B1 = torch.ceil(mask_BS.sum(1, keepdim=True) * share - 1e-6)
    order_BS = score_BS.sort(dim=1, descending=True, stable=True).indices
    rank_BS = torch.empty_like(order_BS).scatter_(
        1, order_BS, torch.arange(order_BS.shape[1], device=order_BS.device).expand_as(order_BS)
    )
    return ((rank_BS < count_B1) & mask_BS).view(-1)


def run_tokens(call: Call, x_BSD: Tensor, decision: TokenDecision, forecaster: nn.Module | None) -> Any:
    """Carry out a token decision at an attention or MLP.

    Args:
        call: the module's own forward.
        x_BSD: float [B, S, D], the module's input.
        decision: what each token does.
        forecaster: stand-in for approximated tokens.

    Returns:
        What the module returns.

    Raises:
        RoutingError: if a token is to be approximated without a forecaster.
    """
    if decision.approximate and forecaster is None:
        raise RoutingError("action 3 (approximate) needs a forecaster, but forecaster_hidden is not set in the config.")
    learning = torch.is_grad_enabled() and call.module.training
    if decision.blend:
        return _blend(call, x_BSD, decision, forecaster)
    if decision.run is True and decision.gate_T is None:
        return call(x_BSD)
    width = x_BSD.shape[-1]
    base_TD = _base(x_BSD.reshape(-1, width), decision, forecaster)
    if decision.run is False:
        if call.kind == "attention":
            _write_keys(call, x_BSD)
        return call.wrap(base_TD.view_as(x_BSD))
    if decision.run is True or (call.kind == "attention" and learning):
        out_TD = call.output(x_BSD).reshape(-1, width)
        if decision.gate_T is not None:
            out_TD = out_TD * decision.gate_T[:, None].to(out_TD.dtype)
        run_T = (decision.action_T == EXECUTE)[:, None]
        return call.wrap(torch.where(run_T, out_TD, base_TD).view_as(x_BSD))
    if call.kind == "mlp":
        return _sparse_mlp(call, x_BSD, base_TD, decision)
    return _sparse_attention(call, x_BSD, base_TD, decision)


def _base(x_TD: Tensor, decision: TokenDecision, forecaster: nn.Module | None) -> Tensor:
    """What the tokens get that do not run: nothing, or a forecast times what the gate leaves."""
    from moe_kit_kernels import token_gather, token_scatter

    base_TD = torch.zeros_like(x_TD)
    if not decision.approximate:
        return base_TD
    assert forecaster is not None
    weights_T = None if decision.gate_T is None else _other_weight(decision)
    x_ND, index_N = token_gather(x_TD, decision.action_T == APPROXIMATE)
    return token_scatter(forecaster(x_ND), index_N, base_TD, weights_T=weights_T)


def _other_weight(decision: TokenDecision) -> Tensor:
    # 1 - g; straight through this is 1 in value, with the gradient of -g
    assert decision.gate_T is not None
    return 1 - decision.gate_T


def _blend(call: Call, x_BSD: Tensor, decision: TokenDecision, forecaster: nn.Module | None) -> Any:
    """g F(x) + (1 - g) G(x) with both computed for every token; measures how much F changes its input."""
    increment = call.output(x_BSD)
    gate = decision.gate_T.view(*x_BSD.shape[:-1], 1).to(increment.dtype)
    trace = decision.trace
    if trace is not None:
        cosine_BS = functional.cosine_similarity(x_BSD.float(), (x_BSD + increment).float(), dim=-1)
        trace.dissimilarity_N = (1 - cosine_BS).reshape(-1)
    other = call.identity(x_BSD) if forecaster is None else forecaster(x_BSD)
    return call.wrap(gate * increment + (1 - gate) * other)


def _sparse_mlp(call: Call, x_BSD: Tensor, base_TD: Tensor, decision: TokenDecision) -> Any:
    from moe_kit_kernels import token_gather, token_scatter

    x_ND, index_N = token_gather(x_BSD.reshape(base_TD.shape), decision.action_T == EXECUTE)
    batch, length = x_BSD.shape[:2]
    with running_tokens(call.routing, index_N[None], batch, length, flat=True):
        out_ND = call.output(x_ND[None])[0]
    return token_scatter(out_ND, index_N, base_TD, weights_T=decision.gate_T).view_as(x_BSD)


class _Captured(CacheView):
    """Writes keys and values, keeps what the attention would have read, and leaves the attention."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer_idx, *args, **kwargs)
        self.keys, self.values = keys, values
        raise KeysWritten


def _write_keys(call: Call, x_BSD: Tensor) -> _Captured | None:
    """Compute and write keys and values of all tokens, nothing else; None if there is nothing to write to."""
    name = call.cache_name or _cache_argument(call)
    if call.cache is None and name is None:
        return None
    captured = _Captured(call.cache)
    try:
        with _silent(call.module, ("q_proj",)):
            call(x_BSD, **{name: captured})
    except KeysWritten:
        return captured
    raise RoutingError(
        f"{type(call.module).__name__} does not write its keys through `{name}.update`: token scope cannot route it; "
        "use units='mlp' or scope='sequence'."
    )


def _cache_argument(call: Call) -> str | None:
    return next((name for name in ("past_key_values", "layer_past") if name in call.kwargs), None)


@contextmanager
def _silent(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Let some projections of an attention return zeros without work, where nobody reads their result."""
    stubbed = []
    for name in names:
        child = module._modules.get(name)
        width = getattr(child, "out_features", None)
        if child is not None and isinstance(width, int):
            child.__dict__["forward"] = lambda x, *args, width=width, **kwargs: x.new_zeros((*x.shape[:-1], width))
            stubbed.append(child)
    try:
        yield
    finally:
        for child in stubbed:
            del child.__dict__["forward"]


def _sparse_attention(call: Call, x_BSD: Tensor, base_TD: Tensor, decision: TokenDecision) -> Any:
    batch, length, width = x_BSD.shape
    keep_BS = (decision.action_T == EXECUTE).view(batch, length)
    mask = call.kwargs.get("attention_mask")
    dense = mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4)
    captured = None if dense else _write_keys(call, x_BSD)
    if captured is None:
        # masks we cannot cut (flash or flex attention): dense attention, results selected
        out_TD = call.output(x_BSD).reshape(-1, width)
        return call.wrap(_select(out_TD, base_TD, decision).view_as(x_BSD))
    # kept tokens to the front of each row; short rows are filled with skipped tokens, whose results are dropped
    order_BS = keep_BS.long().sort(dim=1, descending=True, stable=True).indices
    index_BN = order_BS[:, : int(keep_BS.sum(1).max())]
    name = call.cache_name or _cache_argument(call)
    assert name is not None
    changes: dict[str, Any] = {
        name: KeysGiven(call.cache, captured.keys, captured.values),
        "attention_mask": _mask_rows(mask, index_BN, captured.keys.shape[-2], length),
    }
    embeddings = call.kwargs.get("position_embeddings")
    if embeddings is not None:
        changes["position_embeddings"] = tuple(_take(part, index_BN) for part in embeddings)
    positions = call.kwargs.get("position_ids")
    if positions is not None:
        changes["position_ids"] = positions.expand(batch, -1).gather(1, index_BN)
    x_BND = x_BSD.gather(1, index_BN[..., None].expand(-1, -1, width))
    kept = running_tokens(call.routing, index_BN, batch, length, flat=False)
    with kept, _silent(call.module, ("k_proj", "v_proj")):
        out_BND = call.output(x_BND, **changes)
    full = x_BSD.new_zeros(batch, length, width).scatter(1, index_BN[..., None].expand(-1, -1, width), out_BND)
    return call.wrap(_select(full.view(-1, width), base_TD, decision).view_as(x_BSD))


def _select(out_TD: Tensor, base_TD: Tensor, decision: TokenDecision) -> Tensor:
    if decision.gate_T is not None:
        out_TD = out_TD * decision.gate_T[:, None].to(out_TD.dtype)
    return torch.where((decision.action_T == EXECUTE)[:, None], out_TD, base_TD)


def _take(value: Tensor, index_BN: Tensor) -> Tensor:
    """Tokens of [B or 1, S, ...] at index_BN."""
    value = value.expand(index_BN.shape[0], *value.shape[1:])
    return value.gather(1, index_BN[..., None].expand(-1, -1, value.shape[-1]))


def _mask_rows(mask: Tensor | None, index_BN: Tensor, keys: int, length: int) -> Tensor:
    """Mask [B, 1, N, K] of the kept tokens; without a mask the attention was causal over all keys."""
    batch = index_BN.shape[0]
    if mask is not None:
        rows = mask.expand(batch, *mask.shape[1:])
        return rows.gather(2, index_BN[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
    # several tokens without a mask start a sequence, whatever the room of a static cache; one token sees all keys
    past = 0 if length > 1 else keys - 1
    allowed = torch.arange(keys, device=index_BN.device)[None, None] <= (index_BN + past)[..., None]
    return allowed[:, None]
