"""`moe-kit presets`: the routed methods, one line and a source each."""

from __future__ import annotations

from moe_kit.errors import ConfigError

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Print the presets.

    Args:
        arguments: Words after `moe-kit presets`; only `--help` is known.

    Raises:
        ConfigError: Anything else was given.
    """
    if set(arguments) & {"-h", "--help"}:
        print(
            "usage: moe-kit presets\n\nLists the presets of RoutedAdapterConfig.from_preset(name) with their sources."
        )
        return
    if arguments:
        raise ConfigError(f"got {arguments}, expected no options")
    from rich.console import Console
    from rich.table import Table

    from moe_kit.adapters.presets import PRESETS

    table = Table(box=None, pad_edge=False)
    table.add_column("preset", style="bold", no_wrap=True)
    table.add_column("what it does")
    table.add_column("source", no_wrap=True)
    for name, preset in PRESETS.items():
        table.add_row(name, preset.summary, preset.source)
    table.add_row("lora", "plain PEFT LoRA, for comparison (in recipes only)", "arXiv 2106.09685")
    Console(highlight=False, emoji=False).print(table)
