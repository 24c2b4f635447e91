"""Compiling C++ on first use: kept, shared between processes, and plain PyTorch with a reason wherever it cannot be."""

import logging
import os
import stat

import pytest
import torch
from moe_kit_kernels import KernelError, lora_experts
from moe_kit_kernels.common import native as build
from moe_kit_kernels.common.native import Native
from moe_kit_kernels.lora_experts import native

from tests.kernels.lora_cases import make
from tests.tolerances import assert_close

SOURCE = 'extern "C" long answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def no_compiler():
    try:
        build._compiler()
    except Exception as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler() or "there is one")


@needs_compiler
def test_compiles_once_and_keeps_it(source, tmp_path, monkeypatch):
    assert Native(source, answer="").library.answer() == 42
    (binary,) = (tmp_path / "cache" / "native").iterdir()
    assert stat.S_IMODE(binary.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert Native(source, answer="").library.answer() == 42
    source.write_text(SOURCE.replace("42", "43"))
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        _ = Native(source, answer="").library


@needs_compiler
def test_another_processor_compiles_anew(source, monkeypatch):
    compiler = build._compiler()
    here = build._key(source, compiler)
    monkeypatch.setattr(build.platform, "machine", lambda: "another")
    assert build._key(source, compiler) != here


@needs_compiler
def test_flags_of_the_environment(source, tmp_path, monkeypatch):
    assert Native(source, answer="").library.answer() == 42
    source.write_text('extern "C" long answer() { return ANSWER; }')
    monkeypatch.setenv(build.MORE_FLAGS, "-DANSWER=43 -g")
    assert Native(source, answer="").library.answer() == 43
    monkeypatch.setenv(build.MORE_FLAGS, "-DANSWER=44")
    assert Native(source, answer="").library.answer() == 44, "a library of other flags"


def test_switched_off(source, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert Native(source, answer="").library is None
    assert "MOE_KIT_NATIVE=0" in Native(source, answer="").why_not


def test_without_a_compiler(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert Native(source, answer="").library is None
    assert "no C++ compiler was found: install g++" in Native(source, answer="").why_not


def test_on_another_system(source, monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    assert "Linux only, and this is Darwin" in Native(source, answer="").why_not


@needs_compiler
def test_a_source_that_does_not_compile(source, tmp_path, caplog):
    source.write_text("not C++")
    with caplog.at_level(logging.WARNING):
        assert Native(source, answer="").library is None
    assert "plain PyTorch runs instead" in caplog.text
    assert "error" in Native(source, answer="").why_not
    assert list((tmp_path / "cache" / "native").iterdir()) == [], "nothing half-made stays"


@needs_compiler
def test_a_folder_that_others_may_write_to(source, tmp_path):
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "others may write to" in Native(source, answer="").why_not


@needs_compiler
def test_a_cache_that_cannot_be_made(source, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("MOE_KIT_CACHE", str(file))
    assert "cannot be made" in Native(source, answer="").why_not


@needs_compiler
def test_a_second_openmp_runtime_is_refused(source, monkeypatch):
    found = iter(
        [
            {"/torch/libgomp.so.1"},
            {"/torch/libgomp.so.1", "/usr/libomp.so.5"},
            {"/torch/libgomp.so.1", "/usr/libomp.so.5"},
        ]
    )
    monkeypatch.setattr(build, "_openmp_runtimes", lambda: next(found))
    assert "a second OpenMP runtime (/usr/libomp.so.5)" in Native(source, answer="").why_not


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's list of mapped files")
def test_the_runtime_of_torch_is_found():
    torch.ones(1 << 16).sum()
    assert any("omp" in path for path in build._openmp_runtimes())


def test_auto_runs_without_it_and_insisting_says_why(monkeypatch):
    monkeypatch.setattr(native.NATIVE, "_found", (None, "no C++ compiler was found"), raising=False)
    x, A, B, _, ids, weights = make(64, 8, 2, 96, 96, 8, dtype=torch.float32)
    assert_close("y", lora_experts(x, A, B, ids, weights), lora_experts(x, A, B, ids, weights, backend="reference"))
    with pytest.raises(KernelError, match=r"'native', which cannot run: no C\+\+ compiler was found"):
        lora_experts(x, A, B, ids, weights, backend="native")
