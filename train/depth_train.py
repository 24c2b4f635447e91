"""Train a layer router from a recipe, and save it with its evaluation: `moe-kit train depth/...` as a script.

    python train/depth_train.py depth/first
    python train/depth_train.py depth/dr_llm --phases.0.settings.steps 100
    python train/depth_train.py my.yaml --seed 1 --output_dir outputs/my
    python train/depth_train.py outputs/my --resume

`dr_llm` reads labels that `python train/depth_search.py depth/dr_llm` (or `moe-kit search-layers`) made.
"""

import sys

from moe_kit.commands.options import quiet_libraries
from moe_kit.errors import MoeKitError

if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(__doc__)
        sys.exit(2)
    quiet_libraries()
    from moe_kit.training.depth_command import train_command

    try:
        train_command(sys.argv[1:])
    except MoeKitError as error:
        print(f"depth_train: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\ndepth_train: interrupted. {stop}", file=sys.stderr)
        sys.exit(130)
