"""Model hooks: they open a routing context when a forward pass starts and close it when it ends.

One pair of hooks on the inner Hugging Face model serves PeftModel, native `add_adapter`, `generate`, Trainer, TRL
and gradient checkpointing alike, since every path calls the inner model with its keyword arguments. Parts that may be
called alone (a T5 encoder in `generate`, the backbone without its head) carry a second pair, which works only when no
pass of the whole model is under way.

The closing hook adds the auxiliary losses to the model's loss, multiplied by (local label tokens) /
`num_items_in_batch`, so that the gradient does not depend on how a batch is split over accumulation steps and
processes. How they reach the loss of a trainer that computes its own is told in `delivery.py`.

Each part called inside a pass has a context of its own, and recomputation finds the context of its own pass: see
`passes.py`. The hooks write to the pass's context, so `torch.compile(fullgraph=True)` together with gradient
checkpointing needs `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`: what recomputation
would write again is of no use.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.errors import RoutingError
from moe_kit.hf.batch import IGNORED_LABEL, main_context, memory_context, part_context, shifts_labels
from moe_kit.hf.checks import check_rows
from moe_kit.hf.delivery import deliver, strip_request, unannounce
from moe_kit.hf.generation import Generation, joins_requests, stop_noting
from moe_kit.hf.gradient_checks import Watch, check_policy, check_reentrant, zero_of_policy
from moe_kit.hf.passes import (
    ROOT,
    TABLES,
    Call,
    Part,
    Pass,
    PassLog,
    Place,
    Structure,
    next_number,
    parts_of,
    readers_of_tables,
    running_node,
    tensors_of,
)
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.joined import all_mean
from moe_kit.routing.state import ATTRIBUTE, ModelRouting
from moe_kit.routing.step import backward_task, track

_HOOKS = "moe_routing_hooks"
_PART = "moe_routing_part"
_CALL = nn.Module._call_impl.__code__


class HookedRouting(ModelRouting):
    """Routing state of a Hugging Face model, with what its hooks remember between calls.

    Attributes:
        structure: parts of the model.
        current: the pass under way, or the last one.
        log: passes whose graphs are alive.
        part: the part of the model that is run on its own, if any.
        generation: the call of `generate` under way, if any.
        carries: a router's decisions outlive the forward pass and ride on the cache.
        wants_aux_loss: the caller of the present pass logs `outputs.aux_loss`.
        watch: what an optimizer's next step is checked for.
        untaught: why a backward pass through the outputs of the present pass is refused, else None.
        opened_eagerly: the present pass was opened outside a compiled graph, so its call can be found on the stack.
    """

    def __init__(self, structure: Structure | None = None) -> None:
        self.structure = structure or Structure()
        self.current, self.log = Pass(RoutingContext(is_open=False)), PassLog()
        super().__init__()
        self.part: nn.Module | None = None
        self.generation: Generation | None = None
        self.carries = False
        self.wants_aux_loss = False
        self.watch = Watch()
        self.untaught: str | None = None
        self.opened_eagerly = False

    def __deepcopy__(self, memo: dict) -> HookedRouting:
        # contexts hold graph tensors, which cannot be copied; a copied model starts without one
        memo[id(self)] = fresh = HookedRouting(self.structure)
        fresh.carries, fresh.balances_globally = self.carries, self.balances_globally
        return fresh

    def __reduce__(self) -> tuple:
        return (_restore, (self.structure, self.carries, self.balances_globally))

    @property
    def context(self) -> RoutingContext:
        """Tokens of the pass under way, of the one that is recomputed, or of the last one."""
        found = self.running()
        return found.context if found.override is None else found.override

    @context.setter
    def context(self, context: RoutingContext) -> None:
        """Start a pass by hand; a forward pass of the model starts one with calls of its parts."""
        self.current = Pass(context)

    def _pass(self) -> tuple[Pass, int | None]:
        """The pass of what runs now; with the number of the asking node where it is recomputed."""
        current = self.current
        if not torch.is_grad_enabled() or current.task == (task := backward_task()) or task == -1:
            return current, None
        number = running_node()
        if number is None:
            return current, None
        found = self.log.find(number)
        if found is None and current.calls and current.calls[0].start > number:
            raise RoutingError(
                "gradient checkpointing recomputes a layer of a forward pass that is forgotten, since none of its outputs "
                "is left: keep the output of the model until the backward pass."
            )
        # layers that were called by hand, after a pass
        return (current, None) if found is None else (found, number)

    def context_for(self, place: Place, x: Tensor) -> RoutingContext:
        """Tokens that a layer sees in the pass that runs, or is recomputed.

        Args:
            place: where the layer lies.
            x: float [..., D], its input.
        """
        found, number = self._pass()
        is_narrowed = found.override is not None and not place.reads_memory
        context = found.override if is_narrowed else found.seen(place, number)
        if self.current.table is not None and self.current.is_table(x):
            return context.of_table(x.shape[1])
        return context.fitting(x)

    def running(self) -> Pass:
        """The pass under way, the one that is recomputed, or the last one."""
        return self._pass()[0]

    @contextmanager
    def showing(self, context: RoutingContext) -> Iterator[None]:
        """Let the layers inside a routed unit see other tokens of this pass.

        Args:
            context: their tokens.
        """
        found = self.running()
        previous, found.override = found.override, context
        try:
            yield
        finally:
            found.override = previous


def _restore(structure: Structure, carries: bool, balances_globally: bool) -> HookedRouting:
    state = HookedRouting(structure)
    state.carries, state.balances_globally = carries, balances_globally
    return state


def attach(model: nn.Module) -> HookedRouting:
    """Attach routing state and hooks to an inner Hugging Face model; doing it twice changes nothing.

    Args:
        model: the model whose forward receives `input_ids`, `attention_mask` and `labels`.

    Returns:
        The state that all routers of this model share.
    """
    state = model.__dict__.get(ATTRIBUTE)
    if state is None:
        state = HookedRouting(Structure.of(model))
        model.__dict__[ATTRIBUTE] = state
    if _HOOKS not in model.__dict__:
        handles = [
            model.register_forward_pre_hook(_open, with_kwargs=True),
            model.register_forward_hook(_close, with_kwargs=True, always_call=True),
        ]
        model.__dict__[_PART] = state.structure.part(ROOT)
        for path, part in parts_of(model).items():
            part.__dict__[ATTRIBUTE], part.__dict__[_PART] = state, state.structure.part(path)
            handles.append(part.register_forward_pre_hook(_open_part, with_kwargs=True))
            handles.append(part.register_forward_hook(_close_part, with_kwargs=True, always_call=True))
        for module in readers_of_tables(model):
            module.__dict__[ATTRIBUTE] = state
            handles.append(module.register_forward_pre_hook(_note_table, with_kwargs=True))
        model.__dict__[_HOOKS] = tuple(handles)
    return state


def detach(model: nn.Module) -> None:
    """Remove the hooks and the state; doing it twice changes nothing."""
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()
    for part in (model, *parts_of(model).values(), *readers_of_tables(model)):
        part.__dict__.pop(ATTRIBUTE, None)
        part.__dict__.pop(_PART, None)
    stop_noting(model)
    unannounce(model)


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name.

    Args:
        module: what is called.
        args: its positional arguments.
        kwargs: its named arguments.

    Returns:
        Name -> value.
    """
    if not args:
        return kwargs
    own = "forward" in module.__dict__
    names = tuple(inspect.signature(module.forward).parameters) if own else _names(type(module))
    return {**dict(zip(names, args)), **kwargs}


@functools.cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _open(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    state: HookedRouting = module.__dict__[ATTRIBUTE]
    arguments = named_arguments(module, args, kwargs)
    if module.training and not torch.compiler.is_compiling():
        # a copied or unpickled model has these hooks but was never wrapped in this process
        track(module)
    _start(state, module, arguments)
    changed = strip_request(state, module, kwargs)
    return None if changed is None else (args, changed)


def _start(state: HookedRouting, module: nn.Module, arguments: dict[str, Any]) -> None:
    # a first chunk of a padded prompt looks like rows of padding too; token decisions about it do no harm
    if arguments.get("past_key_values") is None or state.carries:
        check_rows(arguments.get("attention_mask"))
    generation = state.generation
    context = main_context(module, arguments, state.inputs, None if generation is None else generation.prompt_width)
    state.impose(context)
    if joins_requests(arguments):
        context.sequences_known = False
    if state.carries:
        context.carried = _carried(module, arguments, generation)
        if context.carried is not None and not context.carried:
            _look_for_chunks()
    part: Part = module.__dict__[_PART]
    memory = memory_context(arguments, context, None, part.rows_known)
    started = Pass(context, backward_task())
    started.enter(Call(part.path, context, memory, context, next_number()))
    state.current = started
    state.part = None
    state.opened_eagerly = not torch.compiler.is_compiling()


def _look_for_chunks() -> None:
    from moe_kit.hf.chunks import prefill_chunk_size, warn_chunks

    chunk = prefill_chunk_size()
    if chunk is not None:
        warn_chunks(chunk, "the experts of a sequence or request")


def _open_part(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    state: HookedRouting = module.__dict__[ATTRIBUTE]
    arguments = named_arguments(module, args, kwargs)
    current, number = state._pass()
    if number is not None:
        # recomputation of a whole part: its contexts are known
        return
    if not current.context.is_open or _abandoned(state, module):
        _start(state, module, arguments)
        state.part, state.wants_aux_loss = module, False
        return
    part: Part = module.__dict__[_PART]
    context = current.context
    if not part.place.connects:
        outer = None if part.around is None else current.latest.get(part.around, current.calls[0]).context
        context = part_context(module, arguments, context, part.rows_known, outer)
    encoder = state.structure.encoder
    encoded = current.latest.get(encoder) if encoder is not None else None
    memory = memory_context(arguments, context, None if encoded is None else encoded.context, part.rows_known)
    current.enter(Call(part.path, context, memory, context, next_number()))


def _note_table(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    state: HookedRouting = module.__dict__[ATTRIBUTE]
    if torch.compiler.is_compiling():
        return
    arguments = named_arguments(module, args, kwargs)
    table = next((arguments[name] for name in TABLES if arguments.get(name) is not None), None)
    state.current.table = None if table is None else weakref.ref(table)


def _abandoned(state: HookedRouting, module: nn.Module) -> bool:
    """Whether the pass that looks open has died: torch runs no closing hook after a KeyboardInterrupt.

    An open context alone cannot tell a part inside a live pass from a part called after a dead one, and nothing else
    runs when a pass dies. The call stack can: a live pass has its model's call on it, above that of the part. The
    walk happens once for each part (the backbone) and pass; an exception handler of ours around
    forward would be the alternative, and would hide the model's own `forward` from compilers and other hooks.
    """
    if not state.opened_eagerly or torch.compiler.is_compiling():
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL:
            owner = frame.f_locals.get("self")
            if owner is not module and owner.__dict__.get(ATTRIBUTE) is state:
                return False
        frame = frame.f_back
    return True


def _close_part(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    state: HookedRouting = module.__dict__[ATTRIBUTE]
    if state.part is not module:
        if state.current.context.is_open:
            state.current.leave(module.__dict__[_PART].place)
    else:
        state.part = None
        _end(state, output)
        if module.training and torch.is_grad_enabled() and output is not None:
            check_reentrant(state)
            return deliver(state, module, state.total_loss(), None, output)
    return None


def _end(state: HookedRouting, output: Any) -> None:
    current = state.current
    # torch gives no output where the forward raised
    state.close(None if output is None else tensors_of(output))
    current.end()
    if output is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        state.log.add(current.keep_with(output))


def _close(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    state: HookedRouting = module.__dict__[ATTRIBUTE]
    _end(state, output)
    if output is None:
        return None
    _keep_decisions(state.context, module, output)
    arguments = named_arguments(module, args, kwargs)
    learning = module.training and torch.is_grad_enabled()
    loss = _loss_of(output, arguments)
    if learning:
        check_reentrant(state)
        if loss is not None:
            check_policy(state)
    auxiliary = state.total_loss() if learning else None
    if loss is not None:
        total = loss
        if auxiliary is not None:
            total = total + loss_share(module, arguments) * auxiliary.to(loss.device)
        if (
            learning
            and state.context.policy_gradient
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            total = total + zero_of_policy(state)
        if total is not loss:
            output = _with_loss(output, total)
    return deliver(state, module, auxiliary, loss, output, bool(arguments.get("fused_lm_head")))


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output


def _loss_of(output: Any, arguments: dict[str, Any]) -> Tensor | None:
    if isinstance(output, tuple):
        first = output[0] if output and arguments.get("labels") is not None else None
        return first if isinstance(first, Tensor) and first.dim() == 0 else None
    return getattr(output, "loss", None)


def loss_share(module: nn.Module, arguments: dict[str, Any]) -> Tensor | float:
    """Share of the optimizer step's label tokens that this micro-batch holds.

    With balance over all processes it is the mean share of the processes, since each of them adds the loss of all.

    Args:
        module: the inner model.
        arguments: its arguments by name.

    Returns:
        (local label tokens) / `num_items_in_batch`, or 1 if the trainer gave no such number.
    """
    items, labels = arguments.get("num_items_in_batch"), arguments.get("labels")
    if items is None or labels is None:
        return 1.0
    if arguments.get("shift_labels") is not None:
        labels = arguments["shift_labels"]
    elif shifts_labels(module):
        labels = labels[..., 1:]
    local = (labels != IGNORED_LABEL).sum().float()
    state: HookedRouting | None = module.__dict__.get(ATTRIBUTE)
    if state is not None and state.balances_globally:
        local = all_mean(local)
    return local / items


def _cache_of(cache: Any) -> Any:
    """The cache that has a list of layers; the decoder's own in an encoder-decoder cache."""
    return getattr(cache, "self_attention_cache", cache)


def _carried(module: nn.Module, arguments: dict[str, Any], generation: Generation | None) -> dict[str, Tensor] | None:
    """Decisions that ride on the cache of this request, to be filled by its first pass."""
    # a training pass is its own request; generation in training mode runs without gradients
    if module.training and torch.is_grad_enabled():
        return None
    from moe_kit.hf.cache import ensure_carrier

    cache = _cache_of(arguments.get("past_key_values"))
    if cache is None:
        # without a cache the decisions hold for the call of `generate`
        return {} if generation is None else generation.carried
    return ensure_carrier(cache, _num_layers(module)).sites


def _keep_decisions(context: RoutingContext, module: nn.Module, output: Any) -> None:
    """Decisions of a pass that made its own cache ride on that cache."""
    cache = _cache_of(getattr(output, "past_key_values", None))
    if not context.carried or cache is None or not hasattr(cache, "layers"):
        return
    from moe_kit.hf.cache import ensure_carrier

    sites = ensure_carrier(cache, _num_layers(module)).sites
    if sites is not context.carried:
        sites.update(context.carried)


def _num_layers(module: nn.Module) -> int:
    config: Any = getattr(module, "config", None)
    return config.get_text_config(decoder=True).num_hidden_layers
