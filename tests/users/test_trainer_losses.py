"""Training with a trainer whose loss is not the model's: the auxiliary losses arrive, with our coefficient, once.

Each case trains one step with our loss and one without; the difference of the gradients is the gradient of
`weighted_routing_loss`.
"""

import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from moe_kit import ConfigError, LayerRoutingConfig, RoutedTrainer, routing_losses
from moe_kit.hf.delivery import depends_on
from moe_kit.routing import weighted_routing_loss
from tests.conformance.common import rows
from tests.tiny import batch_of, tiny_llama, tiny_moe
from tests.users.trainers import (
    COEFFICIENT,
    NO_COEFFICIENT,
    ONE_STEP,
    assert_delivered,
    auxiliary_part,
    base_without_coefficient,
    catch,
    routed_model,
    tiny_classifier,
    trl_trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SWITCH = {"switch": COEFFICIENT}
TARGETS = ["q_proj", "up_proj"]


def build(losses):
    return routed_model(losses=losses, target_modules=TARGETS)


def equal_rows(count=4):
    return [rows(1)[0]] * count


def stock(model, optimizer, folder, trainer_class=Trainer, data=None, options=None, **overrides):
    arguments = TrainingArguments(str(folder), **{**ONE_STEP, "per_device_train_batch_size": 4, **overrides})
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=data or rows(4), optimizers=(optimizer, None), **(options or {})
    )
    trainer.train()
    return trainer


def summed(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class ReadsLogits(Trainer):
    """A loss of the user's own, from a model that got labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.logits.square().mean()


class AddsItself(Trainer):
    """What a user writes who knows that the model's loss is not used."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(input_ids=inputs["input_ids"]).logits.square().mean() + weighted_routing_loss(model)


class AddsHalf(Trainer):
    """A coefficient of the user's own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(input_ids=inputs["input_ids"]).logits.square().mean()
        return loss + sum(COEFFICIENT / 2 * value for value in routing_losses(model).values())


class TwoPasses(Trainer):
    """Two passes of a step, as with consistency losses."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first = model(input_ids=inputs["input_ids"]).logits
        return (first - model(input_ids=inputs["input_ids"].flip(1)).logits).square().mean()


class TwoPassesOneLoss(Trainer):
    """The model's loss of one pass, and another pass beside it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss
        return loss + model(input_ids=inputs["input_ids"]).logits.square().mean()


OWN_LOSS = {
    "label smoothing": dict(label_smoothing_factor=0.1),
    "label smoothing, RoutedTrainer": dict(label_smoothing_factor=0.1, trainer_class=RoutedTrainer),
    "compute_loss_func": dict(options=dict(compute_loss_func=summed)),
    "labels given, logits read": dict(trainer_class=ReadsLogits),
    "added by the user": dict(trainer_class=AddsItself),
    "two passes": dict(trainer_class=TwoPasses),
}


class TestTransformers:
    @pytest.mark.parametrize("kind", OWN_LOSS)
    def test_a_loss_of_its_own(self, tmp_path, kind):
        assert_delivered(*auxiliary_part(stock, build, SWITCH, folder=tmp_path, **OWN_LOSS[kind]))

    @pytest.mark.parametrize("kind", ["label smoothing", "compute_loss_func", "labels given, logits read"])
    @pytest.mark.parametrize(("size", "steps"), [pytest.param(2, 2, marks=pytest.mark.slow), (1, 4)])
    def test_accumulation_changes_nothing(self, tmp_path, kind, size, steps):
        options = dict(OWN_LOSS[kind], per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        assert_delivered(*auxiliary_part(stock, build, SWITCH, folder=tmp_path, data=equal_rows(), **options))

    def test_with_gradient_checkpointing(self, tmp_path):
        options = dict(label_smoothing_factor=0.1, gradient_checkpointing=True)
        assert_delivered(*auxiliary_part(stock, build, SWITCH, folder=tmp_path, **options))

    def test_what_the_user_weighs_is_not_added_again(self, tmp_path):
        part, wanted = auxiliary_part(stock, build, SWITCH, folder=tmp_path, trainer_class=AddsHalf)
        assert_delivered(part, {key: value / 2 for key, value in wanted.items()})

    def test_one_of_two_passes_brings_it(self, tmp_path):
        part, _ = auxiliary_part(stock, build, SWITCH, folder=tmp_path, trainer_class=TwoPassesOneLoss)
        _, wanted = auxiliary_part(stock, build, SWITCH, folder=tmp_path)
        assert_delivered(part, wanted)

    def test_a_step_that_died_leaves_nothing_behind(self, tmp_path):
        class Dies(ReadsLogits):
            died = False

            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                if not self.died:
                    self.died = True
                    raise MemoryError
                return loss

            def train(self):
                with pytest.raises(MemoryError):
                    super().train()
                super().train()
                assert "backward" not in vars(self.accelerator)

        part, wanted = auxiliary_part(stock, build, SWITCH, folder=tmp_path, trainer_class=Dies)
        assert_delivered(part, wanted)

    def test_frozen_routers_stay_frozen(self, tmp_path):
        def frozen(losses):
            return routed_model(losses=losses, target_modules=TARGETS, freeze_router=True)

        found, _, _ = catch(stock, frozen, SWITCH, folder=tmp_path, label_smoothing_factor=0.1)
        assert found
        assert not any("router" in key for key in found)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["label smoothing", "compute_loss_func"])
    def test_compiled(self, tmp_path, kind):
        options = dict(OWN_LOSS[kind], torch_compile=True, torch_compile_backend="aot_eager")
        assert_delivered(*auxiliary_part(stock, build, SWITCH, folder=tmp_path, **options))

    def test_layer_routers(self, tmp_path):
        def build_layers(losses):
            torch.manual_seed(0)
            from peft import get_peft_model

            model = get_peft_model(tiny_llama(layers=4), LayerRoutingConfig.from_preset("first", losses=losses))
            for name, parameter in model.named_parameters():
                if "scorer" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            return model.train()

        part, wanted = auxiliary_part(
            stock, build_layers, {"rate": COEFFICIENT}, folder=tmp_path, label_smoothing_factor=0.1
        )
        assert_delivered(part, wanted)


class TestOwnLoops:
    """Without a Trainer nobody can add them but the loop, which is told at its first step."""

    def loop(self, loss_of):
        model = build(SWITCH)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    @pytest.mark.parametrize("labels", [False, True])
    def test_a_loss_without_them_is_refused(self, labels):
        batch = batch_of()
        batch = batch if labels else {"input_ids": batch["input_ids"]}
        with pytest.raises(ConfigError, match=r"switch.*weighted_routing_loss\(model\).*losses=\{\}"):
            self.loop(lambda model: model(**batch).logits.square().mean())

    def test_the_backbone_alone_is_refused_too(self):
        with pytest.raises(ConfigError, match="weighted_routing_loss"):
            self.loop(lambda m: m.get_base_model().model(batch_of()["input_ids"]).last_hidden_state.square().mean())

    def test_loops_that_do_right_are_let_alone(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="moe_kit")
            self.loop(lambda model: model(**batch_of()).loss)
            self.loop(lambda model: model(**batch_of(), return_dict=False)[0])
            ids = batch_of()["input_ids"]
            self.loop(lambda model: model(ids).logits.square().mean() + weighted_routing_loss(model))
            self.loop(lambda model: model(ids).logits.mean() + 0.1 * routing_losses(model)["switch"])

    def test_a_pass_that_is_only_looked_at_is_no_fault(self):
        model, ids = build(SWITCH), batch_of()["input_ids"]
        other = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD([*other.parameters(), *(p for p in model.parameters() if p.requires_grad)], lr=0.1)
        model(ids)
        other(torch.ones(2)).sum().backward()
        optimizer.step()

    def test_the_step_of_another_model_is_no_fault(self):
        model, ids = build(SWITCH), batch_of()["input_ids"]
        other = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        (model(ids).logits.mean() + other(torch.ones(2)).sum()).backward()
        optimizer.step()


class TestDependsOn:
    def test_data_parallel_outputs_are_told_apart(self):
        """Data parallelism passes all outputs through one node."""

        class _DDPSink(torch.autograd.Function):
            @staticmethod
            def forward(ctx, reference, *inputs):
                return tuple(value.view_as(value) for value in inputs)

            @staticmethod
            def backward(ctx, *gradients):
                return None, *gradients

        weight = torch.ones(3, requires_grad=True)
        logits = weight * 2
        term = weight.square().sum()
        loss = logits.sum() + term
        logits, loss = _DDPSink.apply("model", logits, loss)
        assert loss.grad_fn.name() == "_DDPSinkBackward"
        assert depends_on(loss * 2, [term])
        assert not depends_on(logits.mean(), [term])


class TestLayerRoutersWithoutATeacher:
    """Layer routers that learn nothing from a language-model loss say what they need."""

    def build(self, preset="dr_llm", **overrides):
        from peft import get_peft_model

        return get_peft_model(tiny_llama(layers=4), LayerRoutingConfig.from_preset(preset, **overrides)).train()

    UNTAUGHT = {
        "searched labels": ({}, "fit_supervised"),
        "hard tokens": (dict(preset="flexi", branch_scale="none", losses={}), "fit_supervised"),
        "sampled": (dict(train_mode="sample", actions=["skip", "execute"]), "fit_policy"),
    }

    @pytest.mark.parametrize("kind", UNTAUGHT)
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_trainer_is_refused(self, tmp_path, kind, checkpointing):
        overrides, advice = self.UNTAUGHT[kind]
        model = self.build(**overrides)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with pytest.raises(ConfigError, match=rf"layer routers.*{advice}.*requires_grad_\(False\)"):
            stock(model, optimizer, tmp_path, gradient_checkpointing=checkpointing)

    def test_other_adapters_may_learn_beside_it(self):
        from peft import LoraConfig

        model = tiny_llama(layers=4)
        model.add_adapter(LayerRoutingConfig.from_preset("dr_llm"), "depth")
        model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2), "lora")
        model.set_adapter(["depth", "lora"])
        model.train()
        with pytest.warns(UserWarning, match="fit_supervised"):
            model(**batch_of()).loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**batch_of()).loss.backward()

    def test_capacity_routing_without_its_predictor_loss_is_told(self):
        model = self.build("mod", losses={"capacity": 0.0})
        with pytest.warns(UserWarning, match="causal predictor"):
            model(**batch_of()).loss.backward()

    @pytest.mark.parametrize("preset", ["first", "informed", "flexi", "mod"])
    def test_presets_that_learn_do(self, preset):
        model = self.build(preset)
        model(**batch_of(4, 12)).loss.backward()
        idle = [n for n, p in model.named_parameters() if p.requires_grad and "router" in n and p.grad is None]
        assert not idle


def train_with_trl(model, optimizer, folder, name="SFT", options=None, **overrides):
    options = dict(optimizers=(optimizer, None), **(options or {}))
    trainer = trl_trainer(name, model, folder, options=options, **{**ONE_STEP, **overrides})
    trainer.train()
    return trainer


def build_classifier(losses):
    return routed_model(tiny_classifier(), losses=losses, target_modules=TARGETS, task_type="SEQ_CLS")


SFT_LOSSES = {
    "nll": {},
    "dft": dict(loss_type="dft"),
    "chunked_nll": dict(loss_type="chunked_nll"),
    "label smoothing": dict(label_smoothing_factor=0.1),
    "compute_loss_func": dict(options=dict(compute_loss_func=summed)),
    "coefficient 0": dict(router_aux_loss_coef=0.0),
    "checkpointing": dict(gradient_checkpointing=True),
}


class TestTRL:
    @pytest.mark.parametrize("kind", SFT_LOSSES)
    def test_sft(self, tmp_path, kind):
        assert_delivered(*auxiliary_part(train_with_trl, build, SWITCH, folder=tmp_path, **SFT_LOSSES[kind]))

    # a model without any auxiliary loss is no mixture of experts for TRL, which then refuses a coefficient
    TINY = {"switch": 1e-9}

    @pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
    def test_a_coefficient_for_the_bases_own_routers_does_not_scale_ours(self, tmp_path, name):
        options = dict(without=self.TINY, folder=tmp_path, name=name, router_aux_loss_coef=0.5)
        assert_delivered(*auxiliary_part(train_with_trl, build, SWITCH, **options))

    @pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
    def test_preferences_and_rewards(self, tmp_path, name):
        assert_delivered(*auxiliary_part(train_with_trl, build, SWITCH, folder=tmp_path, name=name))

    def test_a_reward_model(self, tmp_path):
        assert_delivered(*auxiliary_part(train_with_trl, build_classifier, SWITCH, folder=tmp_path, name="Reward"))

    def test_the_log_has_them(self, tmp_path):
        _, _, trainer = catch(train_with_trl, build, SWITCH, folder=tmp_path)
        assert trainer.state.log_history[0]["aux_loss"] >= 0.99 * COEFFICIENT

    def test_coefficients_of_a_mixture_of_experts(self, tmp_path):
        self.check_mixtral(tmp_path, 0.0, 0.5)

    @pytest.mark.slow
    @pytest.mark.parametrize("base", [None, 0.0, 0.02])
    @pytest.mark.parametrize("trl", [None, 0.0, 0.5])
    def test_all_coefficients_of_a_mixture_of_experts(self, tmp_path, base, trl):
        self.check_mixtral(tmp_path, base, trl)

    def check_mixtral(self, folder, base, trl):
        def mixtral(losses):
            coefficient = {} if base is None else dict(router_aux_loss_coef=base)
            return routed_model(tiny_moe("Mixtral", **coefficient), losses=losses, target_modules=["q_proj"])

        assert_delivered(*auxiliary_part(train_with_trl, mixtral, SWITCH, folder=folder, router_aux_loss_coef=trl))

    @pytest.mark.parametrize(
        "family",
        [pytest.param(name, marks=pytest.mark.slow if index else []) for index, name in enumerate(NO_COEFFICIENT)],
    )
    def test_a_base_that_names_no_coefficient(self, tmp_path, family):
        def build_base(losses):
            target = NO_COEFFICIENT[family][0]
            return routed_model(base_without_coefficient(family), losses=losses, target_modules=[target])

        assert_delivered(*auxiliary_part(train_with_trl, build_base, SWITCH, folder=tmp_path))


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize(("adapter", "gradients"), [(True, False), (False, False), (False, True)])
def test_a_reference_pass_leaves_the_losses_of_the_training_pass(adapter, gradients, train_mode):
    model = build(SWITCH).train()
    assert weighted_routing_loss(model).item() == 0.0
    model(**batch_of())
    expected, parts = weighted_routing_loss(model), routing_losses(model)
    assert expected > 0
    model.train(train_mode)
    with torch.set_grad_enabled(gradients), nullcontext() if adapter else model.disable_adapter():
        model(input_ids=torch.full((2, 5), 3))
    if not train_mode:
        assert routing_losses(model) == {}
        assert weighted_routing_loss(model).item() == 0.0
    model.train()
    assert torch.equal(weighted_routing_loss(model), expected)
    assert routing_losses(model) == parts
    weighted_routing_loss(model).backward()


def test_losses_are_let_go_when_the_next_training_pass_begins():
    model = build(SWITCH).train()
    model(**batch_of())
    kept = weakref.ref(routing_losses(model)["switch"])
    seen = []
    handle = model.get_base_model().model.layers[0].register_forward_pre_hook(lambda *_: seen.append(kept()))
    model(**batch_of())
    handle.remove()
    assert seen == [None]
