"""C++ of this package, compiled by the system's compiler on first use and kept in the user's cache, as Triton keeps its kernels.

There is no build step at installation and no compiled wheel: the machine that runs the code compiles it for its own
processor, in some seconds. Where that cannot be done (no compiler, another system than Linux, a second OpenMP
runtime that would fight with PyTorch's) plain PyTorch serves, and `Native.why_not` says why.

`MOE_KIT_NATIVE=0` in the environment switches native code off; `MOE_KIT_NATIVE_FLAGS` adds flags of the compiler, such as
`-fsanitize=address,undefined` (`make test-sanitize`).
"""

import copy
import ctypes
import hashlib
import logging
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_kit_kernels.common.cache import cache_dir
from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.errors import KernelError

logger = logging.getLogger(__name__)

SWITCH = "MOE_KIT_NATIVE"
MORE_FLAGS = "MOE_KIT_NATIVE_FLAGS"
# sums are contracted where the source says so, in the same loops on every processor: see vectors.h
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
# headers that several sources include
_HEADERS = Path(__file__).parent
INCLUDE = f"-I{_HEADERS}"
_TIMEOUT_S = 300
_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether C++ can read tensors where they lie.

    Args:
        *tensors: None is skipped.
        dtype: the only one that it reads.

    Returns:
        True for tensors of that dtype on the CPU that are of no subclass.
    """
    return all(t is None or (t.dtype is dtype and t.is_cpu and type(t) in _PLAIN) for t in tensors)


def kinds(*tensors: Tensor | None) -> str:
    """Dtypes and devices of tensors in words, for messages.

    Args:
        *tensors: None is skipped.
    """
    found = {f"{t.dtype} on {t.device.type}".removeprefix("torch.") for t in tensors if t is not None}
    return " and ".join(sorted(found))


def is_watched() -> bool:
    """Tell whether somebody looks on who would not see what C++ does.

    Returns:
        True under a tracer, a dispatch mode (a FLOP counter, fake tensors), a transform of `torch.func`, or forward differentiation.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def fits(tensor: Tensor, dtype: torch.dtype, size: int) -> bool:
    """Return True if a library can read a tensor's memory as an array.

    Args:
        tensor: any tensor.
        dtype: dtype of the array.
        size: numbers in the array.

    Returns:
        True for a contiguous tensor of that dtype and size on the CPU that is of no subclass.
    """
    return (
        tensor.dtype is dtype
        and tensor.numel() == size
        and tensor.is_cpu
        and tensor.is_contiguous()
        and type(tensor) in _PLAIN
    )


class Function:
    """One function of a library, and the border that everything handed to it passes.

    A library reads and writes wherever it is told to, so an array of another dtype, size, order or device than it expects is
    somebody else's memory. Each array is therefore passed as a tensor, with its size declared in terms of the numbers that follow it.

    Args:
        name: of the function.
        takes: `name:dtype[size]` of each array, then `name:type` of each number, in the function's order. dtype is float32, int32 or
            int64, `?` behind a name lets None through; size is a sum of products such as `blocks*E+1`; type is int64, int or
            float, `<=256` behind it sets a limit, and whole numbers are 0 or more. The result is an int64_t; that of a function without one means nothing.

    Example:
        >>> Function("f", "x:float32[T*D] H?:float32[T] T:int64 D:int64").arrays
        (('x', torch.float32, 'T*D', False), ('H', torch.float32, 'T', True))
    """

    def __init__(self, name: str, takes: str) -> None:
        self.name = name
        words = [word.split(":") for word in takes.split()]
        arrays = [(of, *kind.rstrip("]").split("[")) for of, kind in words if "[" in kind]
        self.arrays = tuple((of.rstrip("?"), getattr(torch, dtype), size, "?" in of) for of, dtype, size in arrays)
        numbers = {of: kind.split("<=") for of, kind in words if "[" not in kind}
        self.numbers = {of: _NUMBERS[kind] for of, (kind, *_) in numbers.items()}
        self.limits = {of: int(most) for of, (_, *limits) in numbers.items() for most in limits}
        self.expected: dict[tuple[float, ...], list[tuple[torch.dtype, int]]] = {}
        self.entry: Any = None

    def declared(self, library: ctypes.CDLL) -> "Function":
        """Return the function as a library has it.

        Args:
            library: the source, compiled.
        """
        made = copy.copy(self)
        made.entry = getattr(library, self.name)
        made.entry.argtypes = [ctypes.c_void_p] * len(self.arrays) + list(self.numbers.values())
        made.entry.restype = ctypes.c_int64
        return made

    def __call__(self, *arguments: Any) -> int:
        """Check what is handed over and run; a profiler sees the function by its name.

        Args:
            *arguments: tensors, then numbers, as declared.

        Returns:
            What the function returns.

        Raises:
            KernelError: an array is not of its declared dtype and size, contiguous, on the CPU, and of no subclass.
        """
        count = len(self.arrays)
        tensors, numbers = arguments[:count], arguments[count:]
        expected = self.expected.get(numbers) or self._sizes(numbers)
        addresses: list[int | None] = []
        for tensor, (dtype, size) in zip(tensors, expected, strict=True):
            if tensor is None:
                addresses.append(None)
            elif fits(tensor, dtype, size):
                addresses.append(tensor.data_ptr())
            else:
                raise self._mismatch(tensors, expected)
        if None in addresses:
            self._check_optional(tensors)
        if not torch.autograd._profiler_enabled():
            return self.entry(*addresses, *numbers)
        with torch.profiler.record_function(self.name):
            return self.entry(*addresses, *numbers)

    def _sizes(self, numbers: tuple[float, ...]) -> list[tuple[torch.dtype, int]]:
        """Dtype and size of every array under some numbers, kept for the next call."""
        if len(self.expected) > _KEPT_SIZES:
            self.expected.clear()
        values = dict(zip(self.numbers, numbers, strict=True))
        for name, value in values.items():
            if type(value) is int and not 0 <= value <= self.limits.get(name, value):
                raise fail(self.name, name, value, f"0 to {self.limits.get(name, 'any')}", _FIX)

        def size_of(sizes: str) -> int:
            return sum(math.prod(int(values.get(n, n)) for n in term.split("*")) for term in sizes.split("+"))

        self.expected[numbers] = [(dtype, size_of(size)) for _, dtype, size, _ in self.arrays]
        return self.expected[numbers]

    def _check_optional(self, tensors: Sequence[Tensor | None]) -> None:
        for tensor, (name, _, _, optional) in zip(tensors, self.arrays, strict=True):
            if tensor is None and not optional:
                raise fail(self.name, name, None, "a tensor", _FIX)

    def _mismatch(self, tensors: Sequence[Tensor | None], expected: list[tuple[torch.dtype, int]]) -> KernelError:
        """The error that names the first array that does not fit."""
        for tensor, (name, *_), (dtype, size) in zip(tensors, self.arrays, expected, strict=True):
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN:
                return fail(self.name, name, f"a {type(tensor).__name__}", "a plain tensor", _FIX)
            if not tensor.is_cpu or tensor.dtype is not dtype:
                return fail(self.name, name, kinds(tensor), f"{dtype} on cpu".removeprefix("torch."), _FIX)
            if tensor.numel() != size:
                return fail(self.name, f"size of {name}", tensor.numel(), f"{size} numbers", _FIX)
            if not tensor.is_contiguous():
                return fail(self.name, f"strides of {name}", tensor.stride(), "a contiguous tensor", _FIX)
        raise AssertionError("every array fits")


_NUMBERS = {"int64": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}
_KEPT_SIZES = 4096
_FIX = "The call was refused before any memory was touched"


class Native:
    """One source file as a library.

    Args:
        source: the C++ file; its functions are `extern "C"`.
        **takes: what each function takes, see `Function`.
    """

    def __init__(self, source: Path, **takes: str) -> None:
        self.source = source
        self.takes = {name: Function(name, line) for name, line in takes.items()}

    @cached_property
    def _found(self) -> tuple[SimpleNamespace | None, str]:
        try:
            return self.declared(_load(self.source)), ""
        except _Unavailable as error:
            return None, str(error)

    def declared(self, library: ctypes.CDLL) -> SimpleNamespace:
        """Return the functions of a library by name, each behind its checks.

        Args:
            library: the source, compiled.
        """
        return SimpleNamespace(**{name: function.declared(library) for name, function in self.takes.items()})

    def refusal(self, operator: str, wrong: tuple[str, str] | None, *tensors: Tensor | None) -> KernelError:
        """Say why C++ that was asked for by name cannot run.

        Args:
            operator: public name.
            wrong: what it was given and what it takes, where these are not the tensors' dtypes and devices.
            *tensors: the tensors of the call; None is skipped.

        Returns:
            The error to raise.
        """
        fix = 'Pass backend="auto", which runs plain PyTorch here'
        if (given := kinds(*tensors)) != "float32 on cpu":
            wrong = given, "float32 on the CPU"
        if wrong is not None:
            return fail(operator, "backend", f"'native' with {wrong[0]}", wrong[1], fix)
        why = self.why_not or "the tensors are of a subclass"
        return fail(operator, "backend", f"'native', which cannot run: {why}", "native code", fix)

    @property
    def functions(self) -> SimpleNamespace:
        """The functions, where the library is `available`."""
        assert self.library is not None
        return self.library

    @property
    def library(self) -> SimpleNamespace | None:
        """The functions of the loaded library, compiled by the first process that asks; None where it cannot be."""
        return self._found[0]

    @property
    def available(self) -> bool:
        """Whether there is a library."""
        return self.library is not None

    @property
    def why_not(self) -> str:
        """Why there is no library; empty when there is one."""
        return self._found[1]


class _Unavailable(Exception):
    """Native code cannot run here, and the message says why."""


def _load(source: Path) -> ctypes.CDLL:
    if os.environ.get(SWITCH, "1") == "0":
        raise _Unavailable(f"{SWITCH}=0 switches native code off")
    if platform.system() != "Linux":
        raise _Unavailable(f"native code is compiled on Linux only, and this is {platform.system()}")
    compiler = _compiler()
    binary = _folder() / f"{source.stem}-{_key(source, compiler)}.so"
    if not binary.is_file():
        _compile(compiler, source, binary)
    before = _openmp_runtimes()
    try:
        library = ctypes.CDLL(str(binary))
    except OSError as error:
        raise _Unavailable(f"{binary} does not load: {error}") from error
    if before and _openmp_runtimes() != before:
        # two pools of threads would wait for each other's processors
        more = ", ".join(sorted(_openmp_runtimes() - before))
        raise _Unavailable(f"{compiler} brings a second OpenMP runtime ({more}) beside PyTorch's; set CXX to g++")
    return library


def _compiler() -> str:
    """Path of the C++ compiler: `$CXX`, else g++, else c++."""
    for name in (os.environ.get("CXX", ""), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise _Unavailable("no C++ compiler was found: install g++, or point CXX to one")


def _folder() -> Path:
    """The cache's folder for libraries, which nobody else may write to: what lies there is executed."""
    folder = cache_dir() / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise _Unavailable(f"the cache folder {folder} cannot be made: {error.strerror}") from error
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise _Unavailable(f"others may write to {folder}: chmod go-w it, or set MOE_KIT_CACHE to another folder")
    return folder


def _flags() -> list[str]:
    """The package's flags and those of the environment."""
    return [*FLAGS, *shlex.split(os.environ.get(MORE_FLAGS, ""))]


def _key(source: Path, compiler: str) -> str:
    """Name what a library depends on: source, flags, compiler and processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    processor = sorted({line for line in lines if line.startswith(wanted)})
    binary = Path(compiler).stat()
    headers = b"".join(path.read_bytes() for path in sorted(_HEADERS.glob("*.h")))
    parts = (*_flags(), platform.machine(), *processor, compiler, str(binary.st_size), str(binary.st_mtime_ns))
    return hashlib.sha256(source.read_bytes() + headers + "\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, binary: Path) -> None:
    """Compile beside the target and rename: another process sees all of it or nothing."""
    logger.info("compiling %s for this processor (some seconds, kept in %s)", source.name, binary.parent)
    with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
        made = Path(folder) / binary.name
        command = [compiler, *_flags(), INCLUDE, str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _warned(f"{compiler} did not run: {error}") from error
        if done.returncode:
            raise _warned(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
        os.replace(made, binary)


def _warned(message: str) -> _Unavailable:
    # a compiler that is there and fails is worth a line; plain PyTorch serves
    logger.warning("%s (plain PyTorch runs instead; %s=0 silences this)", message, SWITCH)
    return _Unavailable(message)


def _openmp_runtimes() -> set[str]:
    """Files of the OpenMP runtimes in this process."""
    mapped = Path("/proc/self/maps").read_text()
    return {line.split(maxsplit=5)[5] for line in mapped.splitlines() if re.search(r"/lib[gi]?omp\d?[-.]", line)}
