"""The model card that PEFT writes beside an adapter, completed by how to load it."""

from __future__ import annotations

from pathlib import Path

_MARK = "import moe_kit"
_SECTION = """
## Loading

This adapter's method comes with the Python package moe_kit; importing it makes PEFT know the method.

```python
import moe_kit  # first: registers {peft_type} with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{folder}")
```

Without the import, whatever loads the adapter stops with `KeyError: '{peft_type}'`. A tool that loads it by itself
(lm-eval, `transformers serve`) runs in a process that has imported moe_kit with `moe-kit run -m MODULE ...`, such as
`moe-kit run -m lm_eval --model hf --model_args pretrained=BASE,peft=DIR --tasks arc_easy`.
"""


def complete_card(folder: str | Path, peft_type: str) -> None:
    """Add a section on loading to the card of a saved adapter; one that says so already, or no card of PEFT, is left.

    Args:
        folder: where the adapter's configuration was saved. PEFT's card lies there, or a folder above for an adapter
            that is not named `default`.
        peft_type: name of the method in PEFT.
    """
    folder = Path(folder)
    for place in (folder, folder.parent):
        card = place / "README.md"
        if not card.is_file():
            continue
        text = card.read_text(encoding="utf-8")
        if "library_name: peft" in text:
            if _MARK not in text:
                card.write_text(text + _SECTION.format(peft_type=peft_type, folder=folder.name), encoding="utf-8")
            return
