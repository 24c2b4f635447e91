"""Forward passes of a model: whose tokens a layer sees, and which pass a recomputation belongs to.

A model may hold others: vision and audio towers, an encoder, a text backbone. Each of these parts sees tokens of its
own, so each call of a part has a context of its own, and a layer reads that of the innermost part around it. Parts are
the `PreTrainedModel`s inside a model, by their path. Three rules follow from the structure alone:

- A layer inside a part reads the context of that part's call.
- A layer of a model that holds the text decoder, but inside no part (a projector, a head), reads the context of the
  part that ran last: a projector follows a tower, a head follows the decoder.
- Keys and values of cross-attention read the memory that their part was given.

Recomputation under gradient checkpointing runs while a backward pass is under way, when any number of other passes may
have run since. Autograd numbers the nodes of a thread in the order of their creation, so a pass is an interval of
numbers, and the node that asks for recomputed tensors lies in that of its own pass. A pass lives as long as the graph
of its output, which holds it.

Numbers count one thread's nodes: training passes of one model in several threads are not told apart.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.errors import RoutingError
from moe_kit.hf.sharing import is_memory, reads_encoder
from moe_kit.routing.context import RoutingContext

ROOT = ""
"""Path of the whole model, as a part."""

_KEPT = "moe_routing_pass"
TABLES = ("rel_embeddings",)
"""Arguments of attention that are tables of positions."""


@dataclass(frozen=True)
class Place:
    """Where a layer lies among the parts of its model.

    Attributes:
        chain: parts around it, innermost first, `ROOT` last.
        connects: the innermost part holds the text decoder without being it.
        reads_memory: keys and values of cross-attention, or a layer of an encoder that is no part.
    """

    chain: tuple[str, ...] = (ROOT,)
    connects: bool = False
    reads_memory: bool = False


@dataclass(frozen=True)
class Part:
    """What is known of a part before it is called.

    Attributes:
        place: where a layer directly in it lies; its innermost part is this one.
        rows_known: its rows are those of the batch: it holds, is or lies in the decoder, or the encoder before it.
        around: the part whose tokens it may see as well: the one around it on its side, the model for the decoder; None
            for an encoder, a tower, and whatever lies in one.
    """

    place: Place
    rows_known: bool
    around: str | None

    @property
    def path(self) -> str:
        """Its path."""
        return self.place.chain[0]


@dataclass(frozen=True)
class Structure:
    """Parts of a model.

    Attributes:
        parts: their paths.
        decoder: the part that reads the text, or whatever else the model is about; `ROOT` if that is the model itself.
        encoder: the encoder of an encoder-decoder model; None in others.
        towers: parts that read another kind of input than the part that they lie in, or than decoder and encoder.
    """

    parts: tuple[str, ...] = ()
    decoder: str = ROOT
    encoder: str | None = None
    towers: frozenset[str] = frozenset()

    @staticmethod
    def of(model: nn.Module) -> Structure:
        """The structure of a model.

        Args:
            model: any module; one that is no Hugging Face model has no parts.
        """
        paths = {id(module): path for path, module in model.named_modules()}
        parts = parts_of(model)
        pair, decoder, encoder = model, ROOT, None
        while True:
            found = _path_from(pair, "get_decoder", paths)
            if getattr(getattr(pair, "config", None), "is_encoder_decoder", False):
                encoder = _path_from(pair, "get_encoder", paths)
            if found is None or found == decoder:
                break
            # the text part of a model with towers may be an encoder-decoder itself
            decoder, pair = found, parts.get(found, model)
        structure = Structure(tuple(parts), decoder, encoder)
        modules = {ROOT: model, **parts}
        towers = {path for path, part in parts.items() if not structure._reads_as_its_side(path, part, modules)}
        return replace(structure, towers=frozenset(towers))

    def _reads_as_its_side(self, path: str, part: nn.Module, modules: dict[str, nn.Module]) -> bool:
        side = self._side(path)
        if side is None or self.holds_decoder(path):
            return self.holds_decoder(path)
        kinds, own = _modalities(modules.get(side, part)), _modalities(part)
        return "text" in own if "text" in kinds else bool(kinds & own)

    def _side(self, part: str) -> str | None:
        """The decoder or the encoder, whichever a part is or lies in."""
        sides = (self.encoder, self.decoder)
        return next((side for side in sides if side is not None and (part == side or _is_within(part, side))), None)

    def part(self, path: str) -> Part:
        """What is known of a part.

        Args:
            path: its path, or `ROOT`.
        """
        around = None
        if path == self.decoder:
            around = ROOT
        elif path != self.encoder and self.has_rows_of_batch(path):
            outer = [other for other in (*self.parts, ROOT) if other != path and _is_within(path, other)]
            around = max(outer, key=len, default=None)
        return Part(self.place(f"{path}." if path else path), self.has_rows_of_batch(path), around)

    def place(self, path: str) -> Place:
        """Where a module lies.

        Args:
            path: its path.
        """
        inner = sorted((part for part in self.parts if _is_within(path, part)), key=len, reverse=True)
        chain = (*inner, ROOT)
        reads_memory = is_memory(path) or (chain == (ROOT,) and reads_encoder(path))
        return Place(chain, self.holds_decoder(chain[0]), reads_memory)

    def tower(self, path: str) -> str:
        """Which tokens a layer sees, where a model has towers: a name for each tower, for what lies between, or "".

        Args:
            path: its path.
        """
        place = self.place(path)
        if not self.has_rows_of_batch(place.chain[0]):
            return f"#{place.chain[0]}"
        return "#between" if place.connects and not all(map(self.has_rows_of_batch, self.parts)) else ""

    def holds_decoder(self, part: str) -> bool:
        """Whether the decoder is a part inside this one.

        Args:
            part: path of the part.
        """
        return part != self.decoder and _is_within(self.decoder, part)

    def has_rows_of_batch(self, part: str) -> bool:
        """Whether the rows of a part are those of the batch: it holds, is or lies in the decoder, or the encoder before it.

        Args:
            part: path of the part.
        """
        if any(part == tower or _is_within(part, tower) for tower in self.towers):
            return False
        return self.holds_decoder(part) or self._side(part) is not None

    def is_encoders(self, path: str) -> bool:
        """Whether a module lies in the encoder of an encoder-decoder model.

        Args:
            path: path of the module.
        """
        return self.encoder is not None and _is_within(path, self.encoder)


@dataclass(eq=False)
class Call:
    """One call of a part in a pass.

    Attributes:
        path: the part.
        context: its tokens.
        memory: the tokens that its cross-attention reads, if any are known.
        result: the tokens of its output.
        start: first number of its autograd nodes.
        end: number behind the last; None while it runs.
    """

    path: str
    context: RoutingContext
    memory: RoutingContext | None
    result: RoutingContext
    start: int
    end: int | None = None

    def holds(self, number: int) -> bool:
        """Whether a node was made in this call.

        Args:
            number: the node's number.
        """
        return self.start <= number and (self.end is None or number < self.end)


@dataclass(eq=False)
class Pass:
    """One forward pass of a model, or of a part that was called on its own.

    Attributes:
        context: the tokens of what was called.
        task: the backward pass within which this pass was started, -1 for none.
        calls: calls of parts in the order of their start, the first one that of the pass itself.
        latest: part -> its latest call.
        behind: part that holds others -> tokens of the part inside it that ran last.
        override: what the layers of a routed unit see in place of the text's tokens, while one runs.
        table: gives the table of positions that the attention which runs was called with.
        notes: what others keep for the pass, by their name; each has `for_recomputation`, which gives it without graph.
    """

    context: RoutingContext
    task: int = -1
    calls: list[Call] = field(default_factory=list)
    latest: dict[str, Call] = field(default_factory=dict)
    behind: dict[str, RoutingContext] = field(default_factory=dict)
    override: RoutingContext | None = None
    table: Callable[[], Tensor | None] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def enter(self, call: Call) -> None:
        """Start a call of a part.

        Args:
            call: the call.
        """
        self.calls.append(call)
        self.latest[call.path] = call
        self.behind.pop(call.path, None)

    def leave(self, place: Place) -> None:
        """End the latest call of a part.

        Args:
            place: where a layer directly in it lies.
        """
        path, *around = place.chain
        call = self.latest[path]
        call.end = next_number()
        if place.connects:
            call.result = self.behind.get(path, call.context)
        if around:
            self.behind[around[0]] = call.result

    def seen(self, place: Place, number: int | None = None) -> RoutingContext:
        """Tokens of a layer.

        Args:
            place: where the layer lies.
            number: of the autograd node that asks for the layer's forward to be run again; None while the pass runs.
        """
        for path in place.chain:
            call = self.latest.get(path) if number is None else self._call(path, number)
            if call is None:
                continue
            if place.reads_memory and call.memory is not None:
                return call.memory
            if place.connects and path == place.chain[0]:
                behind = self.behind.get(path) if number is None else self._behind(call, number)
                return call.context if behind is None else behind
            return call.context
        return self.context

    def _call(self, path: str, number: int) -> Call | None:
        return next((call for call in reversed(self.calls) if call.path == path and call.holds(number)), None)

    def _behind(self, call: Call, number: int) -> RoutingContext | None:
        ended = [
            (inner.end, -inner.start, inner.result)
            for inner in self.calls
            if inner is not call and inner.end is not None and call.start <= inner.start and inner.end <= number
        ]
        return max(ended, key=lambda known: known[:2])[2] if ended else None

    def is_table(self, x: Tensor) -> bool:
        """Whether the input of a layer is a table of positions, which goes through layers that see tokens as well.

        Args:
            x: the input.
        """
        if self.table is None or x.dim() != 3 or x.shape[0] != 1:
            return False
        table = self.table()
        return table is not None and x.data_ptr() == table.data_ptr()

    def end(self) -> None:
        """End the calls that have not ended: that of the pass itself, and those of parts that raised."""
        for call in self.calls:
            call.end = next_number() if call.end is None else call.end

    def keep_with(self, output: Any) -> Pass:
        """Let the graph of an output hold what recomputation needs of this pass.

        It holds no graph itself: a tensor above the output would hold the graph, and the graph it, for ever.

        Args:
            output: tensors, or a collection of them; those without a graph are skipped.

        Returns:
            What is held.
        """
        contexts: dict[int, RoutingContext] = {}

        def kept(context: RoutingContext) -> RoutingContext:
            if id(context) not in contexts:
                contexts[id(context)] = context.for_recomputation()
            return contexts[id(context)]

        calls = [
            Call(c.path, kept(c.context), None if c.memory is None else kept(c.memory), kept(c.result), c.start, c.end)
            for c in self.calls
        ]
        notes = {name: note.for_recomputation() for name, note in self.notes.items()}
        held = Pass(kept(self.context), self.task, calls, notes=notes)
        for tensor in tensors_of(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.metadata.setdefault(_KEPT, []).append(held)
        return held


class PassLog:
    """The passes of a model whose graphs may still be run backward."""

    def __init__(self) -> None:
        self._passes: list[weakref.ref[Pass]] = []

    def add(self, held: Pass) -> None:
        """Note a pass that a graph holds; only a weak reference is kept.

        Args:
            held: the pass.
        """
        self._passes = [known for known in self._passes if known() is not None]
        self._passes.append(weakref.ref(held))

    def find(self, number: int) -> Pass | None:
        """The pass that made a node.

        Args:
            number: the node's number.

        Returns:
            The pass, or None if none of those that are alive made it.

        Raises:
            RoutingError: if several passes have this number: they ran in several threads.
        """
        found = [known for known in (reference() for reference in self._passes) if known and _holds(known, number)]
        if len(found) > 1:
            raise RoutingError(
                "gradient checkpointing recomputes a layer, and passes of several threads may be meant: run the training "
                "passes of one model in one thread, or without gradient checkpointing."
            )
        return found[0] if found else None


def _holds(known: Pass, number: int) -> bool:
    return bool(known.calls) and known.calls[0].holds(number)


def next_number() -> int:
    """Number of the next autograd node of this thread; -1 while compiling, where nothing is recomputed in Python."""
    return -1 if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()


def running_node() -> int | None:
    """Number of the autograd node that runs in this thread, None for none."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Models inside a model, which see tokens of their own and may be called on their own.

    Args:
        model: the model.

    Returns:
        Path -> backbone, encoder, decoder or tower, outer ones first.
    """
    from transformers import PreTrainedModel

    return {path: module for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel)}


def readers_of_tables(model: nn.Module) -> list[nn.Module]:
    """Modules that are called with a table of positions, as DeBERTa's attention is.

    Args:
        model: the model.
    """
    kinds = {type(module) for module in model.modules()}
    readers = {kind for kind in kinds if any(name in inspect.signature(kind.forward).parameters for name in TABLES)}
    return [module for module in model.modules() if type(module) in readers]


def _modalities(module: nn.Module) -> set[str]:
    """Kinds of input that a model says it reads."""
    kinds = getattr(module, "input_modalities", "text")
    return {kinds} if isinstance(kinds, str) else set(kinds)


def _path_from(model: nn.Module, getter: str, paths: dict[int, str]) -> str | None:
    get = getattr(model, getter, None)
    try:
        return paths.get(id(get())) if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None


def _is_within(path: str, part: str) -> bool:
    return part == ROOT or path.startswith(part + ".")


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors of an output.

    Args:
        value: a tensor, or a collection of them; other things in it are left out.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []
