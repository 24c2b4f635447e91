"""What a layer router costs and saves on held-out examples; an interrupted evaluation goes on with its next batch.

Shapes: B rows, S sequence, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_kit.depth import layer_applications
from moe_kit.depth.search_log import complete_lines
from moe_kit.training.data import Example
from moe_kit.training.depth_data import inputs_of
from moe_kit.training.depth_recipe import DepthRecipe
from moe_kit.training.encoding import Collator, EncodedExamples


@torch.no_grad()
def evaluate_layers(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: DepthRecipe,
    *,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Loss of the right answers and layers applied, the route decided from the prompt.

    Args:
        model: a model with layer routers.
        tokenizer: its tokenizer.
        examples: held-out examples.
        recipe: for the data section and the batch size.
        kept: JSONL file that receives every batch; batches that it holds are not computed again.

    Returns:
        Task -> `nats_per_token`, `exact` (share of examples whose every answer token is the most likely one, which is
        what greedy decoding would answer), `layers` (mean applications of all layers), `count`; and `mean` over tasks.
    """
    rows = EncodedExamples(examples, tokenizer, recipe.data)
    tasks = {example.example_id: example.task for example in examples}
    collate = Collator(pad_token_id=tokenizer.pad_token_id, answer_logits_only=False)
    found: dict[str, list[list[Any]]] = {}
    known = {} if kept is None else {line["ids"][0]: line for line in complete_lines(kept)}
    model.eval()
    for start in range(0, len(rows), recipe.eval_batch_size):
        batch = collate([rows[index] for index in range(start, min(start + recipe.eval_batch_size, len(rows)))])
        ids = list(batch["example_ids"])
        line = known.get(ids[0])
        if line is None or line["ids"] != ids:
            line = {"ids": ids, "values": _measure(model, inputs_of(batch))}
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        for name, values in zip(ids, line["values"]):
            found.setdefault(tasks[name], []).append(values)
    out: dict[str, Any] = {}
    for task, values in found.items():
        out[task] = {
            "nats_per_token": sum(v[0] for v in values) / max(1, sum(v[1] for v in values)),
            "exact": sum(v[3] for v in values) / len(values),
            "layers": sum(v[2] for v in values) / len(values),
            "count": len(values),
        }
    keys = ("nats_per_token", "exact", "layers")
    out["mean"] = {key: sum(out[task][key] for task in found) / len(found) for key in keys}
    return out


def _measure(model: nn.Module, inputs: dict[str, Tensor]) -> list[list[Any]]:
    """Loss of the answer, its tokens, layers applied and whether every token is the most likely one, for each row."""
    logits_BSV = model(**inputs, use_cache=False).logits[:, :-1]
    labels_BS = inputs["labels"][:, 1:]
    loss_BS = functional.cross_entropy(
        logits_BSV.float().transpose(1, 2), labels_BS, ignore_index=-100, reduction="none"
    )
    layers_B = layer_applications(model).float().sum(1)
    counts_B = (labels_BS != -100).sum(1)
    exact_B = ((logits_BSV.argmax(-1) == labels_BS) | (labels_BS == -100)).all(1)
    columns = (loss_BS.sum(1), counts_B, layers_B, exact_B)
    return [list(row) for row in zip(*(column.tolist() for column in columns))]
