"""Runs the kernel cases in Triton's interpreter, in one process of its own: triton reads the switch when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("cases", sorted(path.name for path in FOLDER.glob("cases_*.py")))
def test_in_the_interpreter(cases):
    pytest.importorskip("triton", reason="the kernels need triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(FOLDER / cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
