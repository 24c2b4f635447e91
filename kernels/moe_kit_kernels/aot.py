"""Ahead-of-time compile check: what a machine without a GPU can prove about the Triton kernels.

Every kernel is compiled with Triton's bundled tools, in the variants that a launch would make, for each architecture. A row
fails on any spill or stack use, on a product with tiles of 64 rows or more that lacks its architecture's matrix instruction,
on a product that lost its 128-bit loads in the aligned variant, and on shared memory over the device's limit. Time, cache
hits, bank conflicts and races stay unseen here.

**How an operator takes part**: its folder has a module `aot.py` with one function

    def variants(arch: str) -> list[Variant]

`check` finds all such modules by itself. A `Variant` names example values for the integer arguments; from them the
attributes follow as the JIT would set them (1 becomes a constant, multiples of 16 are marked so), and all pointers count as
16-byte aligned, as torch allocates them. Give each kernel its tuned variant and one of odd sizes:

    Variant(
        "combine", "aligned", combine_kernel,
        pointers={"y_ptr": "*bf16", ...}, integers={"O": 4096}, constants={"BN": 1024, ...}, num_warps=4, wide_loads=True,
    )

Compiled kernels are cached by Triton, keyed on the kernel's source, the attributes and the target: an unchanged kernel
costs nothing in the next run. Run it with `moe-kit kernels check` or `python -m moe_kit_kernels.aot`; `--first` compiles one
variant of each kernel, which is what continuous integration does from a cold cache.

gfx942 is checked where the wheel can compile for it. Misses that are known there, listed with their reasons in `KNOWN`, are
reported and do not fail.
"""

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moe_kit_kernels
from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.tuning import SHARED_LIMIT

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""Checked unless the caller names others."""
_LIMIT = {**SHARED_LIMIT, "gfx942": 65536}
KNOWN = {
    (
        "gfx942",
        "no 128-bit load",
    ): "blocks are sized for warps of 32 lanes: over wavefronts of 64 a lane has half of 16 bytes",
    (
        "gfx942",
        "64 bytes of stack",
    ): "odd widths of grouped_mm_dact keep an address an element, of which 256 registers hold fewer",
}
"""(Architecture, how the miss's sentence begins) -> its reason."""
_MATRIX = {"mma": r"\bmma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma"}
_WIDE = r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|cp\.async\.cg\.shared\.global[^;]*\b0x10\b|cp\.async\.bulk|global_load_dwordx4|buffer_load_dwordx4"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One specialisation of one kernel, as a launch would compile it."""

    kernel: str
    """Name in the report: operator or kernel."""
    name: str
    """Name of the specialisation, such as "aligned-128" or "odd"."""
    function: Any
    """The `triton.jit` function (an autotuned or heuristic wrapper is unwrapped)."""
    pointers: Mapping[str, str]
    """Argument -> type, such as "*bf16"."""
    integers: Mapping[str, int] = field(default_factory=dict)
    """Argument -> example value, from which its type and attributes follow."""
    floats: tuple[str, ...] = ()
    """Arguments that are float32 scalars."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """constexpr argument -> value."""
    num_warps: int = 4
    """Warps a program."""
    num_stages: int = 3
    """Software pipeline depth."""
    tile_rows: int = 0
    """Rows (M) of the product's tile; 0 for a kernel without a product on the matrix units."""
    wide_loads: bool = False
    """Whether 128-bit loads must be there: true for aligned variants."""


def registered(arch: str) -> list[Variant]:
    """Return the variants of every operator folder that has an `aot` module, for one architecture.

    Args:
        arch: "sm_80", "sm_90", "sm_100" or "gfx942"; an operator may choose tiles by it.

    Returns:
        Variants, by folder name.
    """
    found = []
    for module in pkgutil.iter_modules(moe_kit_kernels.__path__):
        name = f"moe_kit_kernels.{module.name}.aot"
        if module.ispkg and importlib.util.find_spec(name) is not None:
            found += importlib.import_module(name).variants(arch)
    return found


def check(
    archs: Iterable[str] = ARCHITECTURES,
    json_path: str | Path | None = None,
    keep_dir: str | Path | None = None,
    kernels: Iterable[str] | None = None,
    *,
    first: bool = False,
) -> list[dict]:
    """Compile every registered variant for every architecture and judge the machine code.

    Args:
        archs: Architectures, "sm_XX" or "gfx942".
        json_path: Where to write the rows; None writes nothing.
        keep_dir: Folder that receives `<kernel>.<variant>.<arch>.cubin` (`.hsaco` for AMD); None keeps nothing.
        kernels: Only these kernels; None means all.
        first: Only the first variant of each kernel.

    Returns:
        Rows with kernel, variant, arch, registers, spill_bytes, shared_bytes, mma (the matrix instructions found, as
        "name x count", empty without), ok, problems (a list of sentences), and known (the reason of a known miss, else empty).

    Raises:
        KernelError: Triton is not installed, its interpreter is switched on, an architecture or kernel is unknown.
    """
    if importlib.util.find_spec("triton") is None:
        raise fail("aot.check", "triton", "not installed", "an installed triton", "pip install 'moe-kit[kernels]'")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise fail("aot.check", "TRITON_INTERPRET", "1", "unset: the interpreter replaces the compiler", "Unset it")
    archs, wanted = list(archs), None if kernels is None else set(kernels)
    unknown = [arch for arch in archs if arch not in _LIMIT]
    if unknown:
        raise fail("aot.check", "archs", unknown, f"names among {sorted(_LIMIT)}", "Correct the name")
    rows = []
    for arch in archs:
        variants = registered(arch)
        names = {variant.kernel for variant in variants}
        if wanted is not None and wanted - names:
            raise fail("aot.check", "kernels", sorted(wanted - names), f"names among {sorted(names)}", "Correct them")
        if first:
            variants = [
                next(v for v in variants if v.kernel == name) for name in dict.fromkeys(v.kernel for v in variants)
            ]
        for variant in variants:
            if wanted is None or variant.kernel in wanted:
                rows.append(_judge(variant, arch, keep_dir))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def compile_variant(variant: Variant, arch: str) -> Any:
    """Compile one variant and return Triton's compiled kernel (`asm`, `metadata`).

    Args:
        variant: What to compile.
        arch: Architecture name.

    Returns:
        The object that `triton.compile` returns.

    Raises:
        KernelError: The variant does not name every argument of the kernel, or names one it does not have.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = variant.function
    while not hasattr(function, "arg_names") or not hasattr(function, "cache_key"):
        function = function.fn
    signature, constants, attributes = {}, dict(variant.constants), {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in variant.pointers:
            signature[name] = variant.pointers[name]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in variant.floats:
            signature[name] = "fp32"
        elif name in variant.integers:
            value = variant.integers[name]
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value == 1:
                signature[name], constants[name] = "constexpr", 1
            elif value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            raise fail(
                "aot.check", f"argument {name} of {variant.kernel}", "not described", "a type or value", "Add it"
            )
    described = {*variant.pointers, *variant.integers, *variant.constants, *variant.floats}
    if described - set(function.arg_names):
        extra = sorted(described - set(function.arg_names))
        raise fail("aot.check", f"arguments of {variant.kernel}", extra, f"{function.arg_names}", "Remove them")
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(ASTSource(function, signature, constants, attributes), target=target, options=options)


def _judge(variant: Variant, arch: str, keep_dir: str | Path | None) -> dict:
    row = {"kernel": variant.kernel, "variant": variant.name, "arch": arch, "registers": 0, "spill_bytes": 0}
    row |= {"shared_bytes": 0, "mma": "", "ok": False, "problems": [], "known": ""}
    problems: list[str] = row["problems"]
    try:
        compiled = compile_variant(variant, arch)
    except moe_kit_kernels.KernelError:
        raise
    except Exception as error:  # a compiler failure is a finding about the kernel, not about this function
        problems.append(f"does not compile: {type(error).__name__}: {str(error)[:500]}")
        return row
    amd = arch.startswith("gfx")
    text = compiled.asm["amdgcn"] if amd else compiled.asm["ptx"]
    binary = compiled.asm["hsaco"] if amd else compiled.asm["cubin"]
    row["registers"], row["spill_bytes"] = _amd_resources(text) if amd else _nvidia_resources(binary)
    row["shared_bytes"] = compiled.metadata.shared
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _MATRIX.items()}
    row["mma"] = " ".join(f"{name} x {count}" for name, count in counts.items() if count)
    if row["spill_bytes"]:
        problems.append(f"{row['spill_bytes']} bytes of stack or spills; use smaller tiles or more warps")
    if row["shared_bytes"] > _LIMIT[arch]:
        problems.append(f"{row['shared_bytes']} bytes of shared memory, the limit is {_LIMIT[arch]}; use fewer stages")
    expected = _instruction(arch, variant.tile_rows)
    if expected and not counts[expected]:
        problems.append(f"no {expected} instruction in a product with tiles of {variant.tile_rows} rows")
    if variant.wide_loads and not re.search(_WIDE, text):
        problems.append("no 128-bit load in the aligned variant")
    row["ok"] = not problems
    reasons = [
        next((why for (a, start), why in KNOWN.items() if a == arch and p.startswith(start)), "") for p in problems
    ]
    # one unknown miss among them fails
    row["known"] = "; ".join(reasons) if all(reasons) else ""
    if keep_dir is not None:
        Path(keep_dir).mkdir(parents=True, exist_ok=True)
        suffix = "hsaco" if amd else "cubin"
        (Path(keep_dir) / f"{variant.kernel}.{variant.name}.{arch}.{suffix}").write_bytes(binary)
    return row


def _instruction(arch: str, tile_rows: int) -> str:
    """Return the matrix instruction a product must use: small tiles use mma on every NVIDIA architecture."""
    if tile_rows == 0:
        return ""
    if arch.startswith("gfx"):
        return "mfma"
    large = {"sm_90": "wgmma", "sm_100": "tcgen05"}
    return large.get(arch, "mma") if tile_rows >= 64 else "mma"


def _nvidia_resources(binary: bytes) -> tuple[int, int]:
    """Return registers a thread and bytes of stack plus local memory, from the machine code itself."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_resources(text: str) -> tuple[int, int]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
    return registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1))


def main(arguments: list[str] | None = None) -> int:
    """Run the check from the command line.

    Args:
        arguments: Command-line words; None takes the process's own.

    Returns:
        Exit status: 0 when every row is ok or a known miss.
    """
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time and judge the machine code.")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--keep", help="folder for the compiled kernels")
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--first", action="store_true", help="one variant of each kernel")
    options = parser.parse_args(arguments)
    rows = check(options.arch, options.json, options.keep, options.kernel, first=options.first)
    for row in rows:
        verdict = "ok  " if row["ok"] else "miss" if row["known"] else "FAIL"
        print(
            f"{verdict} {row['kernel']:18s} {row['variant']:18s} {row['arch']:6s} {row['registers']:3d} registers  "
            f"{row['spill_bytes']:4d} B spilled  {row['shared_bytes']:6d} B shared  {row['mma']}"
        )
        for problem in row["problems"]:
            print(f"     {problem}" + (f" (known: {row['known']})" if row["known"] else ""))
    known = sum(bool(row["known"]) for row in rows)
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} ok" + (f", {known} known misses" if known else ""))
    return 0 if all(row["ok"] or row["known"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
