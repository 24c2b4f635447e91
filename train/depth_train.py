"""Train a layer router from a recipe, and save it with its evaluation.

    python train/depth_train.py depth/first
    python train/depth_train.py depth/dr_llm --phases.0.settings.steps 100
    python train/depth_train.py my.yaml --seed 1 --output_dir outputs/my

`dr_llm` reads labels that `python train/depth_search.py depth/dr_llm` (or `moe-kit search-layers`) made.
"""

import json
import sys

from moe_kit.errors import MoeKitError
from moe_kit.training.depth import run_depth


def main(arguments: list[str]) -> int:
    """Run the recipe; prints every tenth step and the result."""
    if not arguments:
        print(__doc__)
        return 2
    try:
        results = run_depth(
            arguments[0],
            arguments[1:],
            on_step=lambda kind, step, loss: step % 10 or print(f"{kind} {step}: {loss:.4f}", flush=True),
        )
    except MoeKitError as error:
        print(f"depth_train: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results["held_out"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
