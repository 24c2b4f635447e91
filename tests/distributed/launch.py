"""Run a piece of Python in two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
START = """
import sys
import torch
import torch.distributed as dist

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
"""
END = "dist.destroy_process_group()\n"


def run_two_processes(body: str, folder: Path) -> None:
    """Run a text in both; it knows `torch`, `dist`, its `rank` and the `folder` that both can write to."""
    script = folder / "worker.py"
    script.write_text(START + body + END)
    paths = [str(ROOT), str(ROOT / "kernels"), *sys.path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    workers = [subprocess.Popen([sys.executable, script, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
