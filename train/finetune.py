"""`moe-kit train` under `accelerate launch` or `torchrun`: same options, one process for each device.

    accelerate launch train/finetune.py quickstart --train.max_steps 50
    torchrun --nproc-per-node 2 train/finetune.py my.yaml --resume

Each process trains its share of every step's examples; the first one evaluates, writes and prints.
"""

import sys

from moe_kit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
