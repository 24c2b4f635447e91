"""Auxiliary losses under other people's trainers: the same router gradient however a batch is split.

The gradient is caught at the optimizer's step, so that everything a trainer does to a loss is in it.
"""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from moe_kit import ConfigError, RoutedTrainer, routing_losses
from moe_kit.hf import hooks
from moe_kit.routing import weighted_routing_loss
from tests.conformance.common import NAME, Caught, config, gradients, routed, rows, wake
from tests.tiny import batch_of, quiet_arguments, tiny_llama, words_tokenizer
from tests.tolerances import assert_close

# large, so that the part of the auxiliary loss is no small difference of two float32 gradients
COEFFICIENT = 8.0
SWITCH = dict(losses={"switch": COEFFICIENT}, target_modules=["q_proj", "up_proj"])


def uneven_rows():
    """Eight rows with one to five label tokens: a wrong share shows."""
    data = rows()
    for index, row in enumerate(data):
        row["labels"][: 1 + index % 4] = -100
    return data


def arguments(folder, **overrides):
    values = dict(
        max_steps=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )
    return quiet_arguments(folder, **{**values, **overrides})


def caught_gradients(model, folder, trainer_class=Trainer, data=None, options=None, **overrides):
    optimizer = Caught(model)
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **overrides),
        train_dataset=data or uneven_rows()[:4],
        optimizers=(optimizer, None),
        **(options or {}),
    )
    trainer.train()
    (found,) = optimizer.caught
    return found


def only_router(found):
    return {key: value for key, value in found.items() if "router" in key}


SPLITS = [(4, 1), (2, 2), (1, 4)]


def auxiliary_part(build, folder, **overrides):
    """Gradient that auxiliary losses alone give: with them, less without."""
    with_losses = caught_gradients(build(SWITCH), folder, **overrides)
    without = caught_gradients(build({**SWITCH, "losses": {}}), folder, **overrides)
    return {key: with_losses[key] - without[key] for key in only_router(with_losses)}


def peft_model(options):
    return routed(**options).train()


def native_model(options):
    model = tiny_llama()
    model.add_adapter(config(**options), NAME)
    wake(model)
    return model.train()


def expected_part(data):
    """Mean of each micro-batch's loss, weighted by its share of the labels: here one micro-batch."""
    model = routed(**SWITCH).train()
    model(**{key: torch.stack([row[key] for row in data]) for key in data[0]})
    (COEFFICIENT * routing_losses(model)["switch"]).backward()
    return gradients(model)


class TestScale:
    @pytest.mark.parametrize("build", [peft_model, native_model])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_one_batch(self, tmp_path, build, checkpointing):
        """4x1: exactly the gradient of the loss itself."""
        options = {"gradient_checkpointing": True} if checkpointing else {}
        found = auxiliary_part(build, tmp_path, per_device_train_batch_size=4, **options)
        wanted = expected_part(uneven_rows()[:4])
        assert found
        for key, value in found.items():
            assert_close(key, value, wanted[key if build is peft_model else f"base_model.model.{key}"])

    @pytest.mark.parametrize("build", [peft_model, native_model])
    def test_equal_rows_split_anyhow(self, tmp_path, build):
        """Equal rows: every micro-batch has the loss of the whole, so the gradient must not depend on the split."""
        data = [rows(1)[0]] * 4
        found = [
            auxiliary_part(build, tmp_path, data=data, per_device_train_batch_size=size, gradient_accumulation_steps=n)
            for size, n in SPLITS
        ]
        for other in found[1:]:
            for key, value in other.items():
                assert_close(key, value, found[0][key])

    @pytest.mark.parametrize(("size", "steps"), SPLITS)
    def test_each_micro_batch_counts_by_its_labels(self, tmp_path, size, steps):
        data = uneven_rows()[:4]
        found = auxiliary_part(
            peft_model, tmp_path, data=data, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        counts = torch.tensor([(row["labels"][1:] != -100).sum() for row in data]).view(steps, size).sum(1)
        wanted = {}
        for index, count in enumerate(counts):
            part = expected_part(data[index * size : (index + 1) * size])
            for key in found:
                wanted[key] = wanted.get(key, 0.0) + part[key] * count / counts.sum()
        for key, value in found.items():
            assert_close(key, value, wanted[key])

    def test_control_without_the_share(self, tmp_path, monkeypatch):
        """The known wrong version grows with the number of accumulation steps."""
        monkeypatch.setattr(hooks, "loss_share", lambda module, arguments: 1.0)
        data = [rows(1)[0]] * 4
        sizes = []
        for size, n in SPLITS:
            found = auxiliary_part(
                peft_model, tmp_path, data=data, per_device_train_batch_size=size, gradient_accumulation_steps=n
            )
            sizes.append(torch.stack([value.norm() for value in found.values()]).norm())
        assert sizes[1] / sizes[0] == pytest.approx(2, rel=1e-3)
        assert sizes[2] / sizes[0] == pytest.approx(4, rel=1e-3)

    def test_evaluation_loss_is_the_cross_entropy(self, tmp_path):
        model = routed(**SWITCH)
        trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=rows(4))
        plain = routed(**{**SWITCH, "losses": {}})
        expected = Trainer(model=plain, args=arguments(tmp_path), eval_dataset=rows(4)).evaluate()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"])

    def test_bf16_training(self, tmp_path):
        found = caught_gradients(peft_model(SWITCH), tmp_path, per_device_train_batch_size=4, bf16=True)
        assert only_router(found)
        assert all(value.isfinite().all() for value in found.values())
        assert {value.dtype for value in found.values()} == {torch.float32}


class TestCheckpointing:
    @pytest.mark.parametrize("sharing", ["none", "input", "block", "model"])
    def test_gradients_are_equal(self, sharing):
        found = []
        for checkpointing in (False, True):
            model = routed(
                router_sharing=sharing, losses={"switch": 1.0}, target_modules=["q_proj", "k_proj", "o_proj"]
            )
            if checkpointing:
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
            loss = model.train()(**batch_of()).loss
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1].keys() == found[1][1].keys()
        for key, value in found[0][1].items():
            assert_close(key, found[1][1][key], value)

    def test_reentrant_is_refused(self):
        model = routed(**SWITCH).train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        with pytest.raises(ConfigError, match=r"reentrant.*use_reentrant': False"):
            model(**batch_of())

    def test_reentrant_is_fine_where_no_loss_is_lost(self):
        model = routed(**{**SWITCH, "losses": {}}).train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model(**batch_of()).loss.backward()
        expected = routed(**{**SWITCH, "losses": {}}).train()
        expected(**batch_of()).loss.backward()
        for key, value in gradients(expected).items():
            assert_close(key, gradients(model)[key], value)


def smoothed(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


OWN_LOSS = {"smoothing": ({"label_smoothing_factor": 0.1}, {}), "function": ({}, {"compute_loss_func": smoothed})}


class TestOwnLoss:
    """Trainers that do not use the model's loss."""

    @pytest.mark.parametrize("kind", OWN_LOSS)
    @pytest.mark.parametrize("trainer_class", [Trainer, RoutedTrainer])
    @pytest.mark.parametrize(("size", "steps"), SPLITS)
    def test_they_are_added(self, tmp_path, kind, trainer_class, size, steps):
        overrides, options = OWN_LOSS[kind]
        overrides = {**overrides, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        data = [rows(1)[0]] * 4
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=FutureWarning)
            found = auxiliary_part(
                peft_model, tmp_path, data=data, trainer_class=trainer_class, options=options, **overrides
            )
        wanted = expected_part(data)
        for key, value in found.items():
            assert_close(key, value, wanted[key])

    def test_the_named_helper(self):
        model = routed(**{**SWITCH, "losses": {"switch": 0.5, "z": 0.25}}).train()
        model(input_ids=batch_of()["input_ids"])
        losses = routing_losses(model)
        torch.testing.assert_close(weighted_routing_loss(model), 0.5 * losses["switch"] + 0.25 * losses["z"])
        assert weighted_routing_loss(routed(losses={})).item() == 0.0

    @pytest.mark.parametrize("kind", OWN_LOSS)
    def test_a_sampled_router_is_refused_at_the_first_step(self, tmp_path, kind):
        overrides, options = OWN_LOSS[kind]
        model = routed(preset="remix").train()
        with pytest.raises(ConfigError, match="policy gradient"):
            Trainer(model=model, args=arguments(tmp_path, **overrides), train_dataset=rows(), **options).train()

    def test_a_loop_with_its_own_estimator_is_let_alone(self):
        model = routed(preset="remix").train()
        logits = model(input_ids=batch_of()["input_ids"]).logits
        routings = [r for _, r, _ in hooks.attach(model.get_base_model()).context.registered]
        (logits.square().mean() + sum(r.log_prob_N.sum() for r in routings)).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


TRL = dict(
    max_steps=1,
    report_to=[],
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    disable_tqdm=True,
    max_grad_norm=0.0,
    lr_scheduler_type="constant",
    logging_steps=1,
    gradient_checkpointing=False,
)


class TestTRL:
    """TRL computes its own losses; ours are added to them, and logged as `aux_loss`."""

    def sft(self, folder, tokenizer, options, packed=False, **overrides):
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9, 10]] * 4 if not packed else [[5, 6, 7], [8, 9]] * 4})
        model = routed(**options).train()
        optimizer = Caught(model)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(str(folder), **{**TRL, "shuffle_dataset": False, **overrides}),
            train_dataset=data,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
        trainer.train()
        return optimizer.caught[0], trainer.state.log_history

    @pytest.mark.parametrize("loss_type", ["nll", "dft"])
    def test_sft_is_invariant_to_the_split(self, tmp_path, tokenizer, loss_type):
        parts = []
        for size, steps in SPLITS:
            values = dict(
                per_device_train_batch_size=size, gradient_accumulation_steps=steps, loss_type=loss_type, max_length=16
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="moe_kit")
                ours, log = self.sft(tmp_path, tokenizer, SWITCH, **values)
                without, _ = self.sft(tmp_path, tokenizer, {**SWITCH, "losses": {}}, **values)
            assert "aux_loss" in log[0]
            parts.append({key: ours[key] - without[key] for key in only_router(ours)})
        assert max(value.abs().max() for value in parts[0].values()) > 1e-3
        for other in parts[1:]:
            for key, value in other.items():
                assert_close(key, value, parts[0][key])
        model = routed(**SWITCH).train()
        model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]] * 4))
        weighted_routing_loss(model).backward()
        for key, value in parts[0].items():
            assert_close(key, value, gradients(model)[key])

    def test_sft_without_padding(self, tmp_path, tokenizer):
        found, _ = self.sft(
            tmp_path, tokenizer, SWITCH, packed=True, padding_free=False, packing=False, per_device_train_batch_size=4
        )
        assert only_router(found)

    def test_sft_wraps_the_model_itself(self, tmp_path, tokenizer):
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model=tiny_llama(),
            args=SFTConfig(str(tmp_path), **TRL, per_device_train_batch_size=2),
            train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4}),
            processing_class=tokenizer,
            peft_config=config(**SWITCH),
        )
        trainer.train()
        assert trainer.state.log_history[0]["aux_loss"] >= 0.99

    def test_sft_evaluates(self, tmp_path, tokenizer):
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 2})
        trainer = SFTTrainer(
            model=routed(**SWITCH),
            args=SFTConfig(str(tmp_path), **TRL),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )
        assert trainer.evaluate()["eval_loss"] > 0

    def test_sampled_routers_are_refused(self, tmp_path, tokenizer):
        with pytest.raises(ConfigError, match="policy gradient"):
            self.sft(tmp_path, tokenizer, {"preset": "remix"}, per_device_train_batch_size=4)

    def test_dpo(self, tmp_path, tokenizer):
        from trl import DPOConfig, DPOTrainer

        parts = []
        pair = {"prompt": "w2 w3", "chosen": "w4 w5", "rejected": "w6 w7"}
        for options in (SWITCH, {**SWITCH, "losses": {}}):
            # TRL looks for an adapter named default
            model = routed(name="default", **options).train()
            optimizer = Caught(model)
            trainer = DPOTrainer(
                model=model,
                args=DPOConfig(str(tmp_path), **TRL, per_device_train_batch_size=2),
                train_dataset=Dataset.from_list([pair] * 4),
                processing_class=tokenizer,
                optimizers=(optimizer, None),
            )
            trainer.train()
            parts.append(only_router(optimizer.caught[0]))
        changed = [(parts[0][key] - parts[1][key]).abs().max() for key in parts[0]]
        assert min(changed) > 1e-4, "the auxiliary loss must reach every router"
