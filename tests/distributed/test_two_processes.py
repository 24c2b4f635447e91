"""Two gloo processes give the gradients of one.

`balance_scope="micro"`: those of the same micro-batches accumulated; `"global"`: those of the joined batch. A control
shows that the two differ. The policy gradient of sampled routers, and the counts of step states, agree as well.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.worker import CASES, run
from tests.tolerances import assert_close

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Both processes' results, from one launch for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "tests/distributed/worker.py", str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(ranks, tmp_path, case):
    # micro-batches one after the other, or joined
    size, steps = (4, 1) if case.startswith("global") else (2, 2)
    expected = run(case, tmp_path, size, steps)
    assert any("router" in key for key in expected)
    if case == "loss_free":
        assert any(value.abs().max() > 0 for key, value in expected.items() if key.endswith("stepper.bias")), (
            "no bias moved"
        )
    for rank, results in enumerate(ranks):
        assert results[case].keys() == expected.keys()
        for key, value in expected.items():
            assert_close(f"rank {rank}: {key}", results[case][key], value)


@pytest.mark.parametrize("kind", ["", "_typed"])
def test_the_two_scopes_differ(ranks, kind):
    """The batch is uneven enough for the test above to tell one from the other."""
    one, two = ranks[0][f"micro{kind}"], ranks[0][f"global{kind}"]
    gaps = [(one[key] - two[key]).norm() / one[key].norm() for key in one if "router" in key]
    assert min(gaps) > 1e-2
