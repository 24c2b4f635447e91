"""The check itself: what it finds in sound kernels, and that it fails on planted faults. One compile each, in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from moe_kit_kernels import KernelError, aot

pytest.importorskip("triton", reason="the check needs triton")

FAULTY = """
import json, sys
import triton, triton.language as tl
from moe_kit_kernels import aot

@triton.jit
def spills(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + offs * n)
    b = tl.load(x_ptr + offs * n + 1)
    s = tl.sum(a * b, 0)
    tl.store(x_ptr + offs * n, a * s + b)

@triton.jit
def product(x_ptr, y_ptr, n, B: tl.constexpr, SLOW: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i[:, None] * n + i[None, :])
    if SLOW:
        y = tl.sum(x.to(tl.float32)[:, :] * 2.0, 1)[:, None] + tl.zeros((B, B), tl.float32)
    else:
        y = tl.dot(x, tl.trans(x))
    tl.store(y_ptr + i[:, None] * n + i[None, :], y)

def variant(name, function, integers, constants, **more):
    pointers = {p: "*fp32" if p == "y_ptr" or function is spills else "*bf16" for p in ("x_ptr", "y_ptr")}
    pointers = {p: t for p, t in pointers.items() if p in function.arg_names}
    return aot.Variant(kernel="planted", name=name, function=function, pointers=pointers, integers=integers,
                       constants=constants, num_warps=4, **more)

variants = [
    variant("spills", spills, {"n": 7}, {"BLOCK": 32768}),
    variant("no matrix unit", product, {"n": 64}, {"B": 64, "SLOW": True}, tile_rows=64),
    variant("narrow loads", product, {"n": 67}, {"B": 64, "SLOW": False}, tile_rows=64, wide_loads=True),
    variant("sound", product, {"n": 64}, {"B": 64, "SLOW": False}, tile_rows=64, wide_loads=True),
]
if __name__ == "__main__":
    rows = [aot._judge(v, "sm_90", None) for v in variants]
    limit = dict(aot._LIMIT)
    aot._LIMIT["sm_90"] = 1024
    rows.append({**aot._judge(variants[-1], "sm_90", None), "variant": "too much shared memory"})
    print(json.dumps(rows))
"""


def python(arguments, **more):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280, **more
    )


def test_planted_faults_are_found(tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    done = python([str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["variant"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    assert rows["sound"]["ok"], rows["sound"]
    assert rows["sound"]["mma"].startswith("wgmma")
    for name, word in {
        "spills": "spills",
        "no matrix unit": "no wgmma",
        "narrow loads": "128-bit",
        "too much shared memory": "limit",
    }.items():
        assert not rows[name]["ok"], rows[name]
        assert any(word in problem for problem in rows[name]["problems"]), rows[name]


def test_command_line_writes_rows_and_keeps_code(tmp_path):
    command = ["-m", "moe_kit_kernels.aot", "--arch", "sm_80", "--kernel", "combine"]
    done = python([*command, "--json", str(tmp_path / "rows.json"), "--keep", str(tmp_path / "kept")])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads(Path(tmp_path / "rows.json").read_text())
    assert {row["variant"] for row in rows} == {"aligned", "odd", "pairs"}
    keys = {"kernel", "variant", "arch", "registers", "spill_bytes", "shared_bytes", "mma", "ok"}
    assert all(keys <= set(row) and row["ok"] and row["registers"] > 0 for row in rows)
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {f"combine.{row['variant']}.sm_80.cubin" for row in rows}


# what they read are indices, under masks
PLANNING = ("count_pairs", "scan_counts", "place_pairs", "list_tiles", "order_tiles")


def test_the_first_variant_stands_for_its_kernel(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    judged = []

    def judge(variant, arch, keep_dir):
        judged.append(variant)
        return {"kernel": variant.kernel, "ok": True}

    monkeypatch.setattr(aot, "_judge", judge)
    kernels = {variant.kernel for variant in aot.registered("sm_90")}
    aot.check(["sm_90"], first=True)
    assert len(judged) == len(kernels)
    assert {variant.kernel for variant in judged} == kernels
    # aligned, and with the tile that has most to lose
    assert all(v.wide_loads or v.kernel.startswith(("topk_gate", "lora_decode", *PLANNING)) for v in judged)
    assert {v.tile_rows for v in judged if v.kernel.startswith("grouped_") or v.kernel == "lora_grouped"} == {128}


def test_four_byte_operands_are_compiled():
    variants = aot.registered("sm_90")
    for kernel in ("grouped_mm", "grouped_mm_dact", "grouped_gram", "lora_grouped", "lora_down_dense", "lora_up_dense"):
        wide = [v for v in variants if v.kernel == kernel and "*fp32" in {v.pointers.get(p) for p in POINTERS}]
        assert len(wide) >= 2
        assert any(v.wide_loads for v in wide)
        # exact products use no matrix instruction
        assert all(v.tile_rows == 0 or v.constants["PRECISION"] == "tf32" or "mixed" in v.name for v in wide)
    mixed = [v for v in variants if {v.pointers.get("x_ptr"), v.pointers.get("a_ptr")} == {"*bf16", "*fp32"}]
    assert mixed, "PEFT trains float32 banks on a bfloat16 base"


POINTERS = ("w_ptr", "dz_ptr", "a_ptr", "b_ptr")


def test_a_known_miss_is_reported_and_does_not_fail(monkeypatch, capsys):
    rows = [{"kernel": "combine", "variant": "aligned", "arch": "gfx942", "registers": 1, "spill_bytes": 0}]
    rows[0] |= {"shared_bytes": 0, "mma": "", "ok": False, "problems": ["no 128-bit load"], "known": "a reason"}
    monkeypatch.setattr(aot, "check", lambda *_, **__: rows)
    assert aot.main(["--arch", "gfx942"]) == 0
    assert "a reason" in capsys.readouterr().out
    rows[0]["known"] = ""
    assert aot.main(["--arch", "gfx942"]) == 1


def test_only_the_known_miss_is_known(monkeypatch):
    variant = next(v for v in aot.registered("gfx942") if v.kernel == "combine")

    class Compiled:
        asm = {"amdgcn": ".vgpr_count: 8\n.private_segment_fixed_size: 0", "hsaco": b""}

        class metadata:
            shared = 0

    monkeypatch.setattr(aot, "compile_variant", lambda *_: Compiled)
    assert aot._judge(variant, "gfx942", None)["known"]
    # another problem beside it fails, and so does the same on another architecture's row
    Compiled.metadata.shared = 1 << 20
    assert not aot._judge(variant, "gfx942", None)["known"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"archs": ["sm_70"]}, "sm_70"), ({"archs": ["sm_90"], "kernels": ["nothing"]}, "nothing")],
)
def test_unknown_names(arguments, match, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match=match):
        aot.check(**arguments)


def test_interpreter_must_be_off(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match="interpreter"):
        aot.check(["sm_90"])


def test_every_operator_with_kernels_is_registered():
    root = Path(aot.__file__).parent
    folders = {path.parent.name for path in root.glob("*/*.py") if "@triton.jit" in path.read_text()}
    registered = {path.parent.name for path in root.glob("*/aot.py")}
    assert {"grouped_mm", "token_gather"} <= registered
    assert folders - registered <= {"common"}, f"no aot.py in {sorted(folders - registered)}"
