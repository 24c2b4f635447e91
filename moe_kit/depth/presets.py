"""Published layer routers as sets of config values, with their sources and what we changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published method.

    Attributes:
        values: fields of `LayerRoutingConfig`.
        summary: one sentence.
        source: where it was published.
    """

    values: dict[str, Any]
    summary: str
    source: str


PRESETS: dict[str, Preset] = {
    "dr_llm": Preset(
        {},
        "Skip, execute or repeat each layer for a prompt; supervised by labels of a tree search.",
        "Dr.LLM, arXiv 2510.12773",
    ),
    "first": Preset(
        dict(
            actions=["skip", "execute"],
            router="linear",
            gate="sigmoid",
            pooling="tokens",
            train_mode="soft",
            losses={"rate": 0.1, "weight": 0.01},
            budget_kind="threshold",
            budget=0.5,
        ),
        "Skip or execute each layer for a prompt; trained softly with a penalty on executed layers, then LoRA.",
        "FiRST, arXiv 2410.12513",
    ),
    "informed": Preset(
        dict(
            units="sub_layer",
            scope="token",
            actions=["approximate", "execute"],
            router="mlp",
            router_hidden=None,
            router_activation="relu",
            forecaster_hidden=100,
            train_mode="gumbel",
            losses={"target": 8.0, "similarity": 0.1},
            target_rate=0.25,
            budget_kind="threshold",
            budget=0.5,
        ),
        "Execute each attention and MLP for a token or let a small forecaster stand in; argmax at inference.",
        "Informed Routing, arXiv 2510.13831",
    ),
    "flexi": Preset(
        dict(
            units="mlp",
            scope="token",
            start=0.5,
            actions=["approximate", "execute"],
            router="mlp",
            router_hidden=64,
            gate="sigmoid",
            forecaster_hidden=64,
            train_mode="gate",
            branch_scale="straight_through",
            losses={"square": 1e-3},
            budget_kind="threshold",
            budget=0.5,
        ),
        "In the upper half, a gate sends each token through the MLP or a small adapter; attention is dense.",
        "FlexiDepth, arXiv 2503.23798",
    ),
    "mod": Preset(
        dict(
            scope="token",
            actions=["skip", "execute"],
            router="capacity",
            gate="sigmoid",
            train_mode="gate",
            branch_scale="straight_through",
            losses={"capacity": 0.01},
            target_rate=0.5,
            budget_kind="threshold",
            budget=0.5,
        ),
        "The top tokens of each sequence run a block in training; a causal predictor decides at inference.",
        "Mixture-of-Depths, arXiv 2404.02258",
    ),
    "static": Preset(
        dict(actions=["skip", "execute"], router="fixed", budget_kind="rate", budget=0.25),
        "The same layers are skipped for every input: evenly spaced, or those named in skip_layers.",
        "Unified Skipping, arXiv 2404.06954; by importance: ShortGPT, arXiv 2403.03853",
    ),
    "random": Preset(
        dict(actions=["skip", "execute"], router="random", budget_kind="rate", budget=0.25),
        "A random set of layers is skipped for each prompt: the control at equal rate.",
        "baseline",
    ),
}
