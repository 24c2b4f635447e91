"""Search routes through the layers for the questions of a recipe: `moe-kit search-layers` as a script.

python train/depth_search.py depth/dr_llm --search.questions 100
"""

import sys

from moe_kit.commands.search_layers import main
from moe_kit.errors import MoeKitError

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MoeKitError as error:
        print(f"depth_search: {error}", file=sys.stderr)
        sys.exit(2)
