"""Runs the kernel cases under Triton's interpreter in a process of their own: the switch is read when Triton is imported."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("cases", sorted(p.name for p in HERE.glob("cases_*.py")))
def test_kernels_equal_their_references(cases):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(HERE / cases), "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
