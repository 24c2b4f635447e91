"""A model with every kind of step state, and a stream of batches; used by both processes of a test."""

import torch

from moe_kit.routing import Router, RoutingContext
from moe_kit.routing.expert_choice import SelectEMAThreshold
from moe_kit.routing.loss_free import LossFreeBias
from moe_kit.routing.schedule import TwoStageEntropy
from moe_kit.routing.scope import TokenScope
from moe_kit.routing.score import LinearScore
from moe_kit.routing.select import SelectTopK
from moe_kit.routing.threshold import SelectPositive, SparsityController
from moe_kit.routing.weight import ReLUWeight, SelectedSoftmaxWeight, SigmoidWeight

E, K, D = 4, 2, 6


class Parts(torch.nn.Module):
    """Four routers on one input; the loss is the mean of their weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)

        def router(select, weight, stepper=None):
            score = LinearScore(D, E, init_std=1.0)
            return Router(E, scope=TokenScope(), score=score, select=select, weight=weight, stepper=stepper)

        self.routers = torch.nn.ModuleList(
            [
                router(SelectTopK(K), SigmoidWeight(), LossFreeBias(E, rate=0.01)),
                router(SelectTopK(K), SigmoidWeight(), LossFreeBias(E, rule="quantile", bins=100)),
                router(SelectEMAThreshold(E, K), SelectedSoftmaxWeight(), TwoStageEntropy(patience=2)),
                router(SelectPositive(), ReLUWeight(), SparsityController(E, K, initial=0.1)),
            ]
        )

    def forward(self, x):
        # the same counts whatever the order of rows; thresholds are means of cut-offs, so every row is a batch
        total = 0.0
        for router in self.routers:
            for row in x:
                total = total + router(row[None], RoutingContext()).dense_NE().square().mean()
        return total / x.shape[0]


def parts():
    """The model, in training mode."""
    return Parts().train()


def stream(steps=4):
    """Batches of four rows."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 16, D, generator=generator) + 1 for _ in range(steps)]
