"""`python -m bench NAME [options]` runs one benchmark of this folder; without a name it lists them."""

import ast
import runpy
import sys
from pathlib import Path


def names() -> dict[str, str]:
    """Return every benchmark with the first line of its docstring; no benchmark is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.name.startswith("_"):
            found[path.stem] = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    return found


def main() -> int:
    """List or run; returns the exit status."""
    available = names()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        for name, line in available.items():
            print(f"python -m bench {name:14s} {line}")
        return 0
    name = sys.argv[1]
    if name not in available:
        print(f"bench: {name!r} is unknown; expected one of {', '.join(available)}", file=sys.stderr)
        return 2
    sys.argv = [f"bench {name}", *sys.argv[2:]]
    runpy.run_module(f"bench.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
