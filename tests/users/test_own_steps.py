"""Training with a step of one's own: several losses, each with a backward pass, a wrapped `accelerator.backward`, or none."""

import weakref

import pytest
import torch
from transformers import Trainer

from tests.tiny import tiny_llama
from tests.users.test_trainer_losses import SWITCH, TARGETS, ReadsLogits, build, stock
from tests.users.trainers import assert_delivered, auxiliary_part, catch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class TwoLosses(Trainer):
    """Two losses of a step, each with a backward pass of its own; the second may be worked off first."""

    order = (0, 1)

    def losses_of(self, model, inputs):
        ids = inputs["input_ids"]
        return [model(input_ids=given).logits.square().mean() for given in (ids, ids.flip(1))]

    def training_step(self, model, inputs, num_items_in_batch=None):
        losses = self.losses_of(model.train(), self._prepare_inputs(inputs))
        for index in self.order:
            self.accelerator.backward(losses[index])
        return sum(loss.detach() for loss in losses)


class TwoLossesReversed(TwoLosses):
    order = (1, 0)


class LossBeside(TwoLosses):
    """The loss of another network first."""

    def losses_of(self, model, inputs):
        return [torch.ones(2, requires_grad=True).sum(), model(input_ids=inputs["input_ids"]).logits.square().mean()]


class LossOfHiddenValues(TwoLosses):
    """What a hook took from inside the first pass, and the outputs of the second."""

    def losses_of(self, model, inputs):
        taken = []
        handle = model.get_base_model().model.layers[1].register_forward_hook(lambda *call: taken.append(call[2]))
        model(input_ids=inputs["input_ids"])
        handle.remove()
        hidden = taken[0] if isinstance(taken[0], torch.Tensor) else taken[0][0]
        return [hidden.square().mean(), model(input_ids=inputs["input_ids"].flip(1)).logits.square().mean()]


@pytest.mark.parametrize("kind", [TwoLosses, TwoLossesReversed, LossOfHiddenValues])
def test_each_of_two_losses_brings_its_own(tmp_path, kind):
    part, mean = auxiliary_part(stock, build, SWITCH, folder=tmp_path, trainer_class=kind)
    assert_delivered(part, {key: 2 * value for key, value in mean.items()})


def test_two_losses_train_plain_lora_as_well(tmp_path):
    from peft import LoraConfig, get_peft_model

    def lora(losses):
        return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS))

    catch(stock, lora, {}, folder=tmp_path, trainer_class=TwoLosses)


def test_a_loss_of_another_network_brings_none(tmp_path):
    assert_delivered(*auxiliary_part(stock, build, SWITCH, folder=tmp_path, trainer_class=LossBeside))


@pytest.mark.parametrize("dies", [False, True])
def test_a_wrapped_backward_is_called_and_kept(tmp_path, dies):
    model, calls = build(SWITCH), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    class Wrapped(ReadsLogits):
        def train(self):
            inner = self.accelerator.backward

            def counting(loss, **kwargs):
                calls.append(loss)
                return inner(loss, **kwargs)

            self.accelerator.backward = counting
            if dies:
                with pytest.raises(MemoryError) as held:
                    super().train()
                assert held.value.__traceback__ is not None, "which holds the step's frame"
            super().train()
            assert vars(self.accelerator)["backward"] is counting

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if dies and not self.state.global_step and not getattr(self, "died", False):
                self.died = True
                raise MemoryError
            return loss

    stock(model, optimizer, tmp_path, Wrapped, max_steps=2)
    assert len(calls) == 2


def test_a_step_without_backward_is_not_held(tmp_path):
    held = []

    class Skips(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            logits = model.train()(input_ids=inputs["input_ids"]).logits
            held.append(weakref.ref(logits))
            return logits.detach().mean()

        def train(self):
            super().train()
            assert "backward" not in vars(self.accelerator)

    model = build(SWITCH)
    stock(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), tmp_path, Skips)
    assert [reference() for reference in held] == [None]
