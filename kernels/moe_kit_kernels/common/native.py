"""C++ of this package, compiled by the system's compiler on first use and kept in the user's cache, as Triton keeps its kernels.

There is no build step at installation and no compiled wheel: the machine that runs the code compiles it for its own
processor, in some seconds. Where that cannot be done (no compiler, another system than Linux, a second OpenMP
runtime that would fight with PyTorch's) plain PyTorch serves, and `Native.why_not` says why.

`MOE_KIT_NATIVE=0` in the environment switches native code off.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_kit_kernels.common.cache import cache_dir
from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.errors import KernelError

logger = logging.getLogger(__name__)

SWITCH = "MOE_KIT_NATIVE"
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


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first number; None for None.

    Args:
        tensor: any tensor in memory.
    """
    return None if tensor is None else tensor.data_ptr()


def run(function: Any, *arguments: Any) -> Any:
    """Call a function of a library; a profiler sees it by its name.

    Args:
        function: the function, its signature declared.
        *arguments: what it takes.

    Returns:
        What it returns.
    """
    if not torch.autograd._profiler_enabled():
        return function(*arguments)
    with torch.profiler.record_function(function.__name__):
        return function(*arguments)


ADDRESS, SIZE, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
"""What functions take: a pointer, int64_t, int, float."""


class Native:
    """One source file as a library.

    Args:
        source: the C++ file; its functions are `extern "C"`.
        **takes: what each function takes. Results are int64_t; that of a function without one means nothing.
    """

    def __init__(self, source: Path, **takes: list[Any]) -> None:
        self.source, self.takes = source, takes

    @cached_property
    def _found(self) -> tuple[ctypes.CDLL | None, str]:
        try:
            return self.declared(_load(self.source)), ""
        except _Unavailable as error:
            return None, str(error)

    def declared(self, library: ctypes.CDLL) -> ctypes.CDLL:
        """Tell ctypes the signatures.

        Args:
            library: the source, compiled.

        Returns:
            The same.
        """
        for name, takes in self.takes.items():
            function = getattr(library, name)
            function.argtypes, function.restype = takes, SIZE
        return library

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
    def functions(self) -> ctypes.CDLL:
        """The library, where it is `available`."""
        assert self.library is not None
        return self.library

    @property
    def library(self) -> ctypes.CDLL | None:
        """The loaded library, compiled by the first process that asks; None where it cannot be."""
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
    parts = (*FLAGS, platform.machine(), *processor, compiler, str(binary.st_size), str(binary.st_mtime_ns))
    return hashlib.sha256(source.read_bytes() + headers + "\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, binary: Path) -> None:
    """Compile beside the target and rename: another process sees all of it or nothing."""
    logger.info("compiling %s for this processor (some seconds, kept in %s)", source.name, binary.parent)
    with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
        made = Path(folder) / binary.name
        command = [compiler, *FLAGS, INCLUDE, str(source), "-o", str(made)]
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
