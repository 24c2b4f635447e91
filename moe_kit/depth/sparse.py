"""Carrying out a per-token decision: only the tokens that execute are computed.

Keys and values of a skipped token are still written, so every later token sees it and every cache is whole:

    MLP         token_gather, the MLP on the short batch, token_scatter
    attention   keys and values for all tokens, then queries, attention and output for the kept ones only
    decode      no token runs: only keys and values are computed

Source of the policy: SkipGPT arXiv 2506.04179, FlexiDepth arXiv 2503.23798.

Shapes: B rows, S sequence, T = B*S tokens, D width, N kept tokens, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_kit.depth.config import APPROXIMATE, EXECUTE
from moe_kit.depth.execute import Call
from moe_kit.depth.narrow import running_tokens
from moe_kit.depth.tokens import TokenDecision
from moe_kit.errors import RoutingError
from moe_kit.hf.cache import CacheView, KeysGiven, KeysWritten


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
    if decision.approximated and forecaster is None:
        raise RoutingError("action 3 (approximate) needs a forecaster, but forecaster_hidden is not set in the config.")
    if decision.blend:
        return _blend(call, x_BSD, decision, forecaster)
    every = decision.running == decision.action_T.shape[0]
    if every and decision.gate_T is None:
        return call(x_BSD)
    if not decision.running:
        if call.kind == "attention":
            _write_keys(call, x_BSD)
        return call.wrap(_complete(None, None, x_BSD, decision, forecaster))
    learning = torch.is_grad_enabled() and call.module.training
    if every or (call.kind == "attention" and learning):
        return call.wrap(_select(call.output(x_BSD), x_BSD, decision, forecaster))
    if call.kind == "mlp":
        return _sparse_mlp(call, x_BSD, decision, forecaster)
    return _sparse_attention(call, x_BSD, decision, forecaster)


def _complete(
    y_ND: Tensor | None, index_N: Tensor | None, x_BSD: Tensor, decision: TokenDecision, forecaster: nn.Module | None
) -> Tensor:
    """Results of the tokens that ran, forecasts of those that are approximated, zeros elsewhere: [B, S, D].

    Each token has one writer, so a single scatter onto zeros places all of them.
    """
    from moe_kit_kernels import token_gather, token_scatter

    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    weights_T = decision.gate_T
    parts = [] if y_ND is None or index_N is None else [(y_ND.to(x_BSD.dtype), index_N)]
    if decision.approximated:
        assert forecaster is not None
        away_T = decision.action_T == APPROXIMATE
        other_ND, other_N = token_gather(x_TD, away_T, bound=decision.approximated)
        parts.append((forecaster(other_ND), other_N))
        if weights_T is not None:
            # straight through, 1 - g is 1 in value with the gradient of -g
            weights_T = torch.where(away_T, 1 - weights_T, weights_T)
    if not parts:
        return torch.zeros_like(x_BSD)
    y_ND, index_N = parts[0] if len(parts) == 1 else (torch.cat(values) for values in zip(*parts))
    return token_scatter(y_ND, index_N, None, num_tokens=x_TD.shape[0], weights_T=weights_T).view_as(x_BSD)


def _select(out_BSD: Tensor, x_BSD: Tensor, decision: TokenDecision, forecaster: nn.Module | None) -> Tensor:
    """The result of a dense module, replaced where a token does not execute."""
    if decision.gate_T is not None:
        out_BSD = out_BSD * decision.gate_T.view(*x_BSD.shape[:-1], 1).to(out_BSD.dtype)
    other_BSD = _complete(None, None, x_BSD, decision, forecaster)
    return torch.where((decision.action_T == EXECUTE).view(*x_BSD.shape[:-1], 1), out_BSD, other_BSD)


def _blend(call: Call, x_BSD: Tensor, decision: TokenDecision, forecaster: nn.Module | None) -> Any:
    """g F(x) + (1 - g) G(x) with both computed for every token; measures how much F changes its input."""
    increment = call.output(x_BSD)
    gate = decision.gate_T.view(*x_BSD.shape[:-1], 1).to(increment.dtype)
    trace = decision.trace
    if trace is not None:
        cosine_BS = functional.cosine_similarity(x_BSD.float(), (x_BSD + increment).float(), dim=-1)
        trace.dissimilarity_N = (1 - cosine_BS).reshape(-1)
    if forecaster is None:
        return call.wrap(gate * increment)
    return call.wrap(gate * increment + (1 - gate) * forecaster(x_BSD))


def _sparse_mlp(call: Call, x_BSD: Tensor, decision: TokenDecision, forecaster: nn.Module | None) -> Any:
    from moe_kit_kernels import token_gather

    batch, length, width = x_BSD.shape
    x_ND, index_N = token_gather(x_BSD.reshape(-1, width), decision.action_T == EXECUTE, bound=decision.running)
    with running_tokens(call.routing, index_N[None], batch, length, flat=True):
        y_ND = call.output(x_ND[None])[0]
    return call.wrap(_complete(y_ND, index_N, x_BSD, decision, forecaster))


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


def _sparse_attention(call: Call, x_BSD: Tensor, decision: TokenDecision, forecaster: nn.Module | None) -> Any:
    batch, length, width = x_BSD.shape
    keep_BS = (decision.action_T == EXECUTE).view(batch, length)
    mask = call.kwargs.get("attention_mask")
    dense = mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4)
    captured = None if dense else _write_keys(call, x_BSD)
    if captured is None:
        # masks we cannot cut (flash or flex attention): dense attention, results selected
        return call.wrap(_select(call.output(x_BSD), x_BSD, decision, forecaster))
    # kept tokens to the front of each row; short rows are filled with skipped tokens, whose results are dropped
    index_BN = keep_BS.long().sort(dim=1, descending=True, stable=True).indices[:, : decision.widest]
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
    index_N = (index_BN + torch.arange(batch, device=index_BN.device)[:, None] * length).flatten()
    x_BND = x_BSD.reshape(-1, width).index_select(0, index_N).view(batch, -1, width)
    kept = running_tokens(call.routing, index_BN, batch, length, flat=False)
    with kept, _silent(call.module, ("k_proj", "v_proj")):
        y_ND = call.output(x_BND, **changes).reshape(-1, width)
    if index_N.shape[0] != decision.running:
        used_N = keep_BS.flatten().index_select(0, index_N)
        front_N = used_N.long().sort(descending=True, stable=True).indices[: decision.running]
        y_ND, index_N = y_ND.index_select(0, front_N), index_N.index_select(0, front_N)
    return call.wrap(_complete(y_ND, index_N, x_BSD, decision, forecaster))


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
