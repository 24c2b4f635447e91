"""C++ sources compiled otherwise than a user's: with flags for other processors, and with a mistake in them."""

import ctypes
import platform
import subprocess

import pytest
from moe_kit_kernels.common.native import FLAGS, INCLUDE, _compiler


def only_where_it_runs(native):
    """Mark tests that need a library.

    Args:
        native: the `Native`.
    """
    return pytest.mark.skipif(not native.available, reason=f"native code does not run here: {native.why_not}")


def run_instead(native, text, flags, folder, monkeypatch):
    """Put another library in the place of a user's.

    Args:
        native: the `Native`.
        text: C++ with the same functions.
        flags: of the compiler.
        folder: for the library.
        monkeypatch: pytest's.
    """
    source, library = folder / "native.cpp", folder / "native.so"
    source.write_text(text)
    subprocess.run([_compiler(), INCLUDE, *flags, str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(native, "_found", (native.declared(ctypes.CDLL(str(library))), ""), raising=False)


def other_vector_widths(test):
    """Parametrize a test over the branches without 512-bit registers, which run here too: `machine` is what to compile for.

    Args:
        test: takes `machine`, and passes it to `run_for`.
    """
    # tuned for a processor for which the compiler contracts some sums and not others, unless the flags say which
    avx2 = ("-mavx2", "-mfma", "-mtune=znver3")
    machines = pytest.mark.parametrize("machine", [avx2, ()], ids=["AVX2", "any x86-64"])
    return machines(pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")(test))


def run_for(machine, native, folder, monkeypatch):
    """Run a source as compiled for another processor.

    Args:
        machine: flags that name it.
        native: the `Native`.
        folder: for the library.
        monkeypatch: pytest's.
    """
    flags = [*(flag for flag in FLAGS if flag != "-march=native"), *machine]
    run_instead(native, native.source.read_text(), flags, folder, monkeypatch)


def plant(bug, native, folder, monkeypatch):
    """Run a source with a mistake in it.

    Args:
        bug: (text of the source, what replaces it).
        native: the `Native`.
        folder: for the library.
        monkeypatch: pytest's.
    """
    text = native.source.read_text()
    assert bug[0] in text, "the source changed: plant the bug anew"
    flags = [{"-O3": "-O1"}.get(flag, flag) for flag in FLAGS]
    run_instead(native, text.replace(*bug), flags, folder, monkeypatch)
