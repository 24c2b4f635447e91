"""Training with TRL: every trainer runs, starts from the right reference policy, and resumes where it stopped.

How the auxiliary losses arrive is in `test_trainer_losses.py`.
"""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from moe_kit import ConfigError, LayerRoutingConfig, RoutingError
from tests.tiny import tiny_llama, words_tokenizer
from tests.users.trainers import QUIET, TEXTS, preferences, routed_model, tiny_classifier, trl_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# "remix" and task routers are refused below, and so is "dr_llm"; "informed" has a test of its own
ROUTED = ["mixture_of_lora", "dense_lora_moe", "hydralora", "expert_choice", "loss_free", "adamole", "remoe", "flylora"]
ROUTED += ["mhr_mu", "mola"]
DEPTH = ["first", "flexi", "mod"]


def model_of(kind, preset, classifies=False):
    """An adapted tiny model that is awake, as if trained before; LoRA as the control."""
    base = tiny_classifier(layers=4) if classifies else tiny_llama(layers=4)
    task = "SEQ_CLS" if classifies else "CAUSAL_LM"
    if kind == "routed":
        # experts that choose tokens see later ones, in the policy and in its reference
        leak = dict(causal_leak="allow") if preset == "expert_choice" else {}
        return routed_model(base, preset, task_type=task, **leak)
    torch.manual_seed(5)
    config = (
        LayerRoutingConfig.from_preset(preset, task_type=task)
        if kind == "depth"
        else LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type=task)
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "scorer" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def learned(model, before):
    """Names of trainable parameters that moved, each of the active adapter."""
    return [n for n, p in model.named_parameters() if p.requires_grad and n in before and not torch.equal(p, before[n])]


def train(name, model, folder, **overrides):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trl_trainer(name, model, folder, **overrides)
    trainer.train()
    return trainer, before


KINDS = [("lora", "lora"), *(("routed", preset) for preset in ROUTED), *(("depth", preset) for preset in DEPTH)]
QUICK = {"lora", "mixture_of_lora", "hydralora", "first", "mod"}


def kinds():
    """All presets; those that are not quick's only in the wide table."""
    return [
        pytest.param(kind, preset, id=preset, marks=[] if preset in QUICK else pytest.mark.slow)
        for kind, preset in KINDS
    ]


class TestReference:
    """The policy has not moved yet, so it is its own reference."""

    @pytest.mark.parametrize(("kind", "preset"), kinds())
    def test_dpo_starts_at_its_reference(self, tmp_path, kind, preset):
        trainer, before = train("DPO", model_of(kind, preset), tmp_path)
        first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
        # TRL logs the sum of its own loss and the auxiliary losses
        assert first["loss"] - first.get("aux_loss", 0.0) == pytest.approx(math.log(2), abs=1e-4)
        assert abs(second["rewards/margins"]) > 1e-5
        assert learned(trainer.model, before)

    @pytest.mark.parametrize(("kind", "preset"), kinds())
    def test_kto_starts_at_its_reference(self, tmp_path, kind, preset):
        trainer, _ = train("KTO", model_of(kind, preset), tmp_path, max_steps=1)
        first = trainer.state.log_history[0]
        assert first["kl"] == pytest.approx(0, abs=1e-5)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert first["loss"] - first.get("aux_loss", 0.0) == pytest.approx(0.5, abs=1e-4)

    @pytest.mark.parametrize("trainer_name", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
    @pytest.mark.parametrize(("kind", "preset"), kinds())
    def test_reward_trainers_start_at_their_reference(self, tmp_path, trainer_name, kind, preset):
        trainer, _ = train(trainer_name, model_of(kind, preset), tmp_path, max_steps=1)
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)

    def test_the_reference_stays_where_it_was(self, tmp_path):
        model = model_of("routed", "mixture_of_lora")
        trainer, before = train("DPO", model, tmp_path, max_steps=3)
        after = trainer.model.state_dict()
        copies = [key for key in after if ".ref." in key]
        assert copies
        assert all(torch.equal(after[key], before[key.replace(".ref.", ".default.")]) for key in copies)

    def test_an_adapter_that_trl_makes_refers_to_the_base(self, tmp_path):
        """A fresh adapter changes nothing, and switching it off gives the reference."""
        import trl

        from tests.conformance.common import config

        trainer = trl.DPOTrainer(
            model=tiny_llama(),
            args=trl.DPOConfig(str(tmp_path), **QUIET, max_steps=2, learning_rate=0.1, gradient_checkpointing=False),
            train_dataset=Dataset.from_list(preferences()),
            processing_class=words_tokenizer(),
            peft_config=config(),
        )
        trainer.train()
        first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
        assert first["rewards/margins"] == 0.0
        assert second["rewards/margins"] != 0.0


class TestSFT:
    WAYS = {
        "plain": {},
        "checkpointing": dict(gradient_checkpointing=True),
        "packing": dict(packing=True, max_length=8),
        "padding-free": dict(padding_free=True, max_length=None),
    }

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        ("kind", "preset"),
        [pytest.param(k, p, id=p, marks=[] if p in ("hydralora", "first") else pytest.mark.slow) for k, p in KINDS],
    )
    def test_it_learns(self, tmp_path, kind, preset, way):
        trainer, before = train("SFT", model_of(kind, preset), tmp_path, max_steps=4, **self.WAYS[way])
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert all(math.isfinite(loss) for loss in losses)
        assert losses[-1] < losses[0]
        assert learned(trainer.model, before)

    @pytest.mark.parametrize(
        ("kind", "preset"), [("lora", "lora"), ("routed", "mixture_of_lora"), ("routed", "loss_free"), ("depth", "mod")]
    )
    def test_checkpointing_changes_nothing(self, tmp_path, kind, preset):
        ends = [
            train("SFT", model_of(kind, preset), tmp_path, gradient_checkpointing=checkpointing)[0].model.state_dict()
            for checkpointing in (False, True)
        ]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

    @pytest.mark.parametrize("preset", ["mixture_of_lora", "hydralora"])
    def test_documents_without_padding_are_the_documents_padded(self, tmp_path, preset):
        """Token routers decide for each token, so how documents share a row changes nothing."""
        ends = [
            train("SFT", model_of("routed", preset), tmp_path, max_steps=1, max_length=None, padding_free=free)
            for free in (False, True)
        ]
        losses = [trainer.state.log_history[0]["loss"] for trainer, _ in ends]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_answers_only(self, tmp_path):
        """The labels of a prompt are masked; routers still see its tokens."""
        data = Dataset.from_dict({"input_ids": TEXTS, "completion_mask": [[0, 0] + [1] * (len(t) - 2) for t in TEXTS]})
        options = dict(data=data, max_steps=1, completion_only_loss=True)
        masked, _ = train("SFT", model_of("routed", "mixture_of_lora"), tmp_path, **options)
        whole, _ = train("SFT", model_of("routed", "mixture_of_lora"), tmp_path, max_steps=1)
        logs = [trainer.state.log_history[0] for trainer in (masked, whole)]
        assert logs[0]["loss"] != logs[1]["loss"]
        # the balance is over all tokens either way
        assert logs[0]["aux_loss"] == pytest.approx(logs[1]["aux_loss"], rel=1e-5)

    @pytest.mark.parametrize(
        "trainer_name",
        ["SFT", "DPO", *(pytest.param(name, marks=pytest.mark.slow) for name in ("KTO", "GRPO", "RLOO"))],
    )
    def test_layer_routers_with_noise(self, tmp_path, trainer_name):
        """Each pass draws Gumbel noise of its own, the reference too: neither starts nor losses can be compared."""
        trainer, before = train(trainer_name, model_of("depth", "informed"), tmp_path, max_steps=4)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 4
        assert all(math.isfinite(loss) for loss in losses)
        assert any("moe_depth_router" in name for name in learned(trainer.model, before))

    def test_accumulation_changes_little(self, tmp_path):
        """Dense routers without auxiliary losses: the split of a batch does not matter."""
        ends = []
        for size, steps in ((4, 1), (1, 4)):
            model = routed_model(tiny_llama(), "dense_lora_moe", losses={})
            options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1)
            trainer, _ = train("SFT", model, tmp_path, optim="sgd", **options)
            ends.append(trainer.model.state_dict())
        for key, value in ends[0].items():
            torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-6)


class TestReward:
    @pytest.mark.parametrize(("kind", "preset"), kinds())
    def test_it_learns(self, tmp_path, kind, preset):
        trainer, before = train("Reward", model_of(kind, preset, classifies=True), tmp_path, max_steps=4)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        moved = learned(trainer.model, before)
        assert any("score" in name for name in moved)
        assert any("moe_" in name or "lora_" in name for name in moved)


class TestRefused:
    TRAINERS = [
        "SFT",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("DPO", "KTO", "RLOO")),
        "GRPO",
        "Reward",
    ]

    @pytest.mark.parametrize("trainer_name", TRAINERS)
    def test_sampled_routers_before_anything_moves(self, tmp_path, trainer_name):
        model = model_of("routed", "remix", classifies=trainer_name == "Reward")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ConfigError, match=r"policy gradient.*RoutedTrainer.*freeze_router=True"):
            train(trainer_name, model, tmp_path)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    def test_sampled_routers_that_are_frozen_are_fine(self, tmp_path):
        model = routed_model(tiny_llama(), "remix", freeze_router=True)
        trainer, before = train("SFT", model, tmp_path)
        assert any("bank" in name for name in learned(trainer.model, before))

    @pytest.mark.parametrize("trainer_name", ["SFT", "DPO", "GRPO"])
    def test_layer_routers_without_labels(self, tmp_path, trainer_name):
        with pytest.raises(ConfigError, match="fit_supervised"):
            train(trainer_name, model_of("depth", "dr_llm"), tmp_path)

    def test_task_routers_ask_for_the_task(self, tmp_path):
        with pytest.raises(RoutingError, match="routing_inputs"):
            train("SFT", routed_model(tiny_llama(), "poly", num_tasks=2), tmp_path)


class Stop(TrainerCallback):
    """Ends training after a step, as a job that was stopped."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


class TestResume:
    @pytest.mark.parametrize(
        "trainer_name", ["SFT", "DPO", *(pytest.param(name, marks=pytest.mark.slow) for name in ("KTO", "Reward"))]
    )
    @pytest.mark.parametrize(
        ("kind", "preset"),
        [
            ("lora", "lora"),
            ("routed", "mixture_of_lora"),
            *(pytest.param(*kind, marks=pytest.mark.slow) for kind in (("routed", "loss_free"), ("depth", "first"))),
        ],
    )
    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, tmp_path, trainer_name, kind, preset):
        options = dict(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)
        classifies = trainer_name == "Reward"
        whole, _ = train(trainer_name, model_of(kind, preset, classifies), tmp_path / "whole", **options)
        train(
            trainer_name,
            model_of(kind, preset, classifies),
            tmp_path / "cut",
            options=dict(callbacks=[Stop()]),
            **options,
        )
        resumed = trl_trainer(trainer_name, model_of(kind, preset, classifies), tmp_path / "cut", **options)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 4
        ends = [trainer.model.state_dict() for trainer in (whole, resumed)]
        assert ends[0].keys() == ends[1].keys()
        for key, value in ends[0].items():
            assert torch.equal(ends[1][key], value), key

    def test_a_run_with_rewards_goes_on(self, tmp_path):
        """TRL draws other completions after a resume, with plain LoRA too, so the ends differ."""
        options = dict(max_steps=4, save_strategy="steps", save_steps=2)
        train("GRPO", model_of("routed", "mixture_of_lora"), tmp_path, options=dict(callbacks=[Stop()]), **options)
        resumed = trl_trainer("GRPO", model_of("routed", "mixture_of_lora"), tmp_path, **options)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 4
        # the reference is saved with the adapter, so it is still that of the start
        assert any(entry.get("kl", 0) > 1e-4 for entry in resumed.state.log_history)

    def test_what_was_saved_loads(self, tmp_path):
        trainer, _ = train("DPO", model_of("routed", "hydralora"), tmp_path, save_strategy="steps", save_steps=2)
        saved = PeftModel.from_pretrained(tiny_llama(layers=4), str(tmp_path / "checkpoint-2")).eval()
        ids = torch.tensor([TEXTS[0]])
        assert torch.equal(saved(ids).logits, trainer.model.eval()(ids).logits)
