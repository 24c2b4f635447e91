"""`moe-kit`: the command line. Finds the command, runs it, and turns expected errors into one line and status 2.

A command is a module with `main(arguments: list[str])`, which returns an exit status or None; it is imported only
when it is called, so that `moe-kit --help` stays quick.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["COMMANDS", "main"]

# command -> (module with main(arguments), one line for the list)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("moe_kit.commands.train", "wrap a model, fine-tune it, compare with the baselines, save the adapter"),
    "eval": ("moe_kit.commands.evaluate", "evaluate a saved adapter again"),
    "generate": ("moe_kit.commands.generate", "answer a prompt with a saved adapter"),
    "inspect": ("moe_kit.commands.inspect", "what is adapted: modules, parameters, FLOPs, routers and their sharing"),
    "presets": ("moe_kit.commands.presets", "the routed methods, one line and a source each"),
    "search-layers": ("moe_kit.commands.search_layers", "search routes through the layers: the labels of dr_llm"),
    "run": (
        "moe_kit.commands.run",
        "`run -m MODULE ...`: another tool (lm_eval, say) in a process that knows our adapters",
    ),
    "kernels": (
        "moe_kit.commands.kernels",
        "`kernels check`: compile every GPU kernel ahead of time; `kernels native`: compile the CPU's code",
    ),
}

_EXAMPLES = """\
examples
  moe-kit train tiny                                  the whole path in seconds, on a random model
  moe-kit train quickstart                            fine-tune SmolLM2-135M on two CPU cores
  moe-kit train quickstart --train.max_steps 50       any field of the recipe is an option
  moe-kit train my.yaml --adapter.settings.r 16       (moe-kit train my.yaml --help lists them)
  moe-kit train my.yaml --resume                      go on after an interruption
  moe-kit train depth/first                           a layer router (moe-kit train --help lists what is shipped)
  moe-kit run -m lm_eval --model hf --model_args pretrained=BASE,peft=DIR --tasks arc_easy
  moe-kit generate outputs/quickstart --prompt "State the final answer to the following arithmetic problem: 3 + 4 ="
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words after `moe-kit`; those of the process by default.

    Returns:
        Exit status: 0 done, 1 a check that failed, 2 an error that the user can mend (printed in one paragraph), 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("moe-kit"))
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMMANDS)}"
        print(f"moe-kit: no command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    # the tokenizers library warns about forks otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from moe_kit_kernels.errors import MoeKitError

    try:
        status = import_module(COMMANDS[words[0]][0]).main(words[1:])
    except MoeKitError as error:
        print(f"moe-kit {words[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        # a run that can be resumed says how
        print(f"\nmoe-kit {words[0]}: interrupted{f'. {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    return status or 0


def _usage() -> str:
    """Lay out the list of commands with examples."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moe-kit COMMAND ... (moe-kit COMMAND --help explains a command)",
            "",
            "Routed adapters for Hugging Face models: mixtures of LoRA experts as a PEFT method.",
            "",
            "commands",
            *lines,
            "",
            _EXAMPLES,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
