"""`RoutedTrainer`: transformers' Trainer with a policy gradient for routers that sample their experts.

Everything else is the stock Trainer: auxiliary losses arrive through the model's hooks, checkpoints are PEFT folders.
Cost of an optimizer step with M samples: one forward and backward pass, plus M - 1 forward passes above the first
adapted layer, plus the backward of the log-probabilities through the routers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from moe_kit.adapters.optimizers import banks_of
from moe_kit.errors import ConfigError
from moe_kit.hf.batch import predicts_next_token
from moe_kit.routing.state import ModelRouting, find_routing_state, policy_gradient
from moe_kit.training.checkpoints import atomic
from moe_kit.training.prefix import shared_prefix
from moe_kit.training.rloo import (
    CREDITS,
    PolicySample,
    at_their_columns,
    has_policy,
    label_items,
    policy_loss,
    sample_of,
    token_losses,
)
from moe_kit.training.routing_log import logged_routing
from moe_kit.training.variance import credit_variance

ADAPTER_GRADIENTS = ("one", "mean")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How sampled routers are trained."""

    num_samples: int = 4
    """Selections of experts drawn for each batch, 2 or more; more lowers the variance and costs a forward pass each."""
    credit: str = "sequence"
    """What a decision is charged with: "sequence", or "to_go" (only labels at or after it; token scope, causal)."""
    adapter_gradient: str = "one"
    """Adapters learn from "one" of the passes, or from the "mean" of all (M backward passes, M graphs in memory)."""
    share_prefix: bool = True
    """Run frozen layers below the first adapter once for all samples; off if they hold dropout that should differ."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            ConfigError: naming the field, what it is, what is expected.
        """
        if self.num_samples < 2:
            raise ConfigError(f"num_samples is {self.num_samples}, expected 2 or more: leave-one-out needs company.")
        for name, known in (("credit", CREDITS), ("adapter_gradient", ADAPTER_GRADIENTS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}.")


def param_groups(
    model: nn.Module,
    lr: float,
    router_lr: float | None = None,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float = 1.0,
) -> list[dict]:
    """Optimizer groups with learning rates of their own for routers, and for the experts' B.

    Args:
        model: a model with adapters; parameters that are not trained are left out.
        lr: learning rate of everything else.
        router_lr: learning rate of all routers; None = each adapter's own `router_lr`, or `lr` where it has none.
        weight_decay: decay of the adapters; routers get none, since decay pulls their scores together.
        loraplus_lr_ratio: the experts' B and LoRA's learn so many times faster than `lr` (LoRA+, arXiv 2402.12354).

    Returns:
        Groups for any torch optimizer: everything else, B where it has a rate of its own, then one for each learning
        rate of routers. Pass them as
        `optimizers=(AdamW(param_groups(...)), None)`.
    """
    configs = getattr(model, "peft_config", {})
    own = {name: getattr(config, "router_lr", None) for name, config in configs.items()}
    routers: dict[float, list[nn.Parameter]] = {}
    others: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    experts_b = {id(bank.B) for bank in banks_of(model)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        _, is_router, rest = name.partition(".moe_adapter_router.")
        if not is_router:
            is_b = ".lora_B." in name or id(parameter) in experts_b
            (fast if is_b and loraplus_lr_ratio != 1 else others).append(parameter)
            continue
        rate = own.get(rest.partition(".")[0]) if router_lr is None else router_lr
        routers.setdefault(lr if rate is None else rate, []).append(parameter)
    groups = [
        {"params": params, "lr": rate, "weight_decay": weight_decay}
        for params, rate in ((others, lr), (fast, lr * loraplus_lr_ratio))
    ]
    groups += [{"params": params, "lr": rate, "weight_decay": 0.0} for rate, params in routers.items()]
    return [group for group in groups if group["params"]]


class RoutedTrainer(atomic(Trainer)):  # type: ignore[misc]
    """transformers' Trainer that also trains sampled routers.

    Checkpoints appear whole, by a rename; training stops at a loss that is not finite and names the step, the batch's
    `example_ids` (where the collator keeps that column) and the last good checkpoint.

    Args:
        *args: as for `transformers.Trainer`.
        policy: how sampled routers are trained; ignored if the model has none.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        ConfigError: if `policy` is not valid.
    """

    def __init__(self, *args: Any, policy: PolicyConfig | None = None, **kwargs: Any) -> None:
        self.policy = policy or PolicyConfig()
        self.policy.validate()
        super().__init__(*args, **kwargs)
        # sums over the micro-batches since the last line of the log
        self._policy_metrics: dict[str, Tensor] = {}
        self._policy_batches = 0

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The stock optimizer, with the routers' own learning rate where a configuration sets one.

        Args:
            model: model to optimise; None = the trainer's.
        """
        model = self.model if model is None else model
        configs = getattr(model, "peft_config", {})
        has_router_lr = any(getattr(config, "router_lr", None) is not None for config in configs.values())
        if self.optimizer is None and has_router_lr:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = param_groups(model, self.args.learning_rate, weight_decay=self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The model's loss; in training plus the policy surrogate, whose value is taken out again.

        The logged loss therefore stays the cross-entropy (with auxiliary losses); only the gradient differs.

        Args:
            model: the model as the Trainer wraps it.
            inputs: a batch with labels.
            return_outputs: also return the model's outputs.
            num_items_in_batch: label tokens of the optimizer step.
        """
        if not (model.training and torch.is_grad_enabled() and has_policy(model)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ConfigError(
                "a sampled router is charged with the model's own cross-entropy, so a compute_loss_func or label "
                "smoothing would train router and experts on different losses: drop it, or set freeze_router=True."
            )
        bare = self.accelerator.unwrap_model(model)
        labels, credit = inputs["labels"], self.policy.credit
        if labels.is_floating_point() or labels.dim() > 2:
            raise ConfigError(
                f"labels have shape {list(labels.shape)} and dtype {labels.dtype}, expected whole numbers, [B, S] for tokens or "
                "[B] for classes: a sampled router is charged with a cross-entropy. Use a preset without sampling for "
                "regression and for several classes at once."
            )
        # a masked language model predicts each label where it stands
        shifted = predicts_next_token(bare.get_base_model() if hasattr(bare, "get_base_model") else bare)
        if credit == "to_go" and not shifted:
            raise ConfigError(
                "credit='to_go' needs a causal language model; use credit='sequence' with an encoder-decoder, a masked "
                "language model or a classifier."
            )
        with policy_gradient(bare) as state, self._prefix(bare):
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            if credit == "sequence" and state.context.sequence_BS is not None:
                raise ConfigError(
                    "credit='sequence' needs one sequence a row, but documents are packed: train without packing, or "
                    "with credit='to_go'."
                )
            samples = [sample_of(state, _losses(state, outputs, inputs, shifted), credit)]
            adapter_losses = [loss]
            for _ in range(self.policy.num_samples - 1):
                with torch.set_grad_enabled(self.policy.adapter_gradient == "mean"):
                    sample, sample_loss = self._sample(bare, state, inputs, num_items_in_batch, shifted)
                samples.append(sample)
                if self.policy.adapter_gradient == "mean":
                    adapter_losses.append(sample_loss * self._loss_factor(num_items_in_batch))
        items = label_items(inputs, num_items_in_batch, shifted)
        surrogate = policy_loss(samples, items, credit) * self._loss_factor(num_items_in_batch)
        self._note(samples, items, shifted and state.context.sequence_BS is None, shifted)
        loss = torch.stack(adapter_losses).mean() + surrogate - surrogate.detach()
        return (loss, outputs) if return_outputs else loss

    def _prefix(self, model: nn.Module) -> Any:
        return shared_prefix(model) if self.policy.share_prefix else nullcontext()

    def _sample(
        self, model: nn.Module, state: Any, inputs: dict[str, Any], num_items: Tensor | int | None, shifted: bool
    ) -> tuple[PolicySample, Tensor]:
        extra = {"num_items_in_batch": num_items} if self.model_accepts_loss_kwargs and num_items is not None else {}
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        # a pass without a graph is charged with the losses of its tokens, and nobody reads the model's own
        silent = nullcontext() if torch.is_grad_enabled() else _without_loss(inner)
        with self.compute_loss_context_manager(), silent:
            outputs = model(**{**inputs, **extra})
        return sample_of(state, _losses(state, outputs, inputs, shifted), self.policy.credit), outputs.loss

    def _loss_factor(self, num_items: Tensor | int | None) -> int:
        """What the stock Trainer multiplies a loss by when tokens are averaged across processes."""
        averaged = self.args.average_tokens_across_devices and num_items is not None
        return self.accelerator.num_processes if averaged else 1

    def _note(self, samples: list[PolicySample], items: Tensor | float, one_sequence: bool, causal: bool) -> None:
        """Keep what tells whether the policy learns: the spread of the losses, and of the gradient under each credit."""
        losses_MB = torch.stack([sample.losses_BS.sum(-1) for sample in samples]) / items
        noted = {"policy_loss_std": losses_MB.std(0).mean()}
        # only where a credit is right: packed rows hold several sequences, and "to_go" needs a causal model
        for credit, holds in (("sequence", one_sequence or not causal), ("to_go", causal)):
            variance = credit_variance(samples, items, credit) if holds else None
            if variance is not None:
                noted[f"policy_variance_{credit}"] = variance
        for name, value in noted.items():
            self._policy_metrics[name] = self._policy_metrics.get(name, 0.0) + value
        self._policy_batches += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with figures on the routers beside the loss.

        The policy's are averaged over the micro-batches since the last line; how the routers spread their choices
        (`routing_...`, see `moe_kit.training.routing_log`) is that of the last one.

        Args:
            logs: values to log.
            *args: as for the stock Trainer.
            **kwargs: as for the stock Trainer.
        """
        if "loss" in logs:
            policy = {name: float(value) / self._policy_batches for name, value in self._policy_metrics.items()}
            self._policy_metrics, self._policy_batches = {}, 0
            logs = {**logs, **policy}
            if self.is_world_process_zero() and find_routing_state(self.model) is not None:
                logs.update(logged_routing(self.model))
        super().log(logs, *args, **kwargs)


@contextmanager
def _without_loss(model: nn.Module) -> Iterator[None]:
    """Inside this block a model's own loss is zero and costs nothing; models that compute it by themselves still do."""
    # a loss that is a module with weights of its own stays where it is
    if not isinstance(model, PreTrainedModel) or "_loss_function" in model._modules:
        yield
        return
    before = vars(model).get("_loss_function")
    model.loss_function = _no_loss
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


def _no_loss(*args: Any, **kwargs: Any) -> Tensor:
    given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return given.new_zeros((), dtype=torch.float32)


def _losses(state: ModelRouting, outputs: Any, inputs: dict[str, Any], shifted: bool) -> Tensor:
    """Losses of a pass at the columns of its tokens, [B, S]."""
    losses_BS = token_losses(outputs.logits.detach(), inputs["labels"], shifted)
    shape = state.context.shape_BS
    return losses_BS if shape is None else at_their_columns(losses_BS, inputs.get("logits_to_keep"), shape[1])
