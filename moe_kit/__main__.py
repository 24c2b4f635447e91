"""`python -m moe_kit COMMAND`: the same as `moe-kit COMMAND`."""

import sys

from moe_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
