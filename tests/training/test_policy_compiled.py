"""A sampled router under `torch.compile`: the same decisions, losses and gradients; still refused without a policy."""

import pytest
import torch
from torch._dynamo.utils import counters

from moe_kit import ConfigError, RoutedTrainer
from moe_kit.routing.state import policy_gradient
from moe_kit.training.trainer import PolicyConfig
from tests.conformance.common import gradients, routed, rows
from tests.tiny import batch_of, quiet_arguments, tiny_llama
from tests.tolerances import assert_close


def remix(**overrides):
    options = dict(score_options={"init_std": 0.5}, target_modules=["q_proj", "down_proj"])
    return routed(preset="remix", **{**options, **overrides}).train()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(folder, compiled, **policy):
    # the layers below the adapters run once for all samples
    model = remix(layers_to_transform=[1])
    arguments = quiet_arguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
    )
    trainer = RoutedTrainer(model=model, args=arguments, train_dataset=rows(8), policy=PolicyConfig(**policy))
    torch.manual_seed(0)
    trainer.train()
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return log, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("policy", [{}, {"adapter_gradient": "mean", "credit": "to_go"}], ids=["one", "mean"])
def test_the_trainer_learns_the_same(tmp_path, policy):
    losses, weights = train(tmp_path, False, num_samples=3, **policy)
    assert counters["stats"]["calls_captured"] == 0
    found, moved = train(tmp_path, True, num_samples=3, **policy)
    assert counters["stats"]["calls_captured"] > 20
    assert len(losses) == 2
    assert found == pytest.approx(losses)
    for name, value in weights.items():
        assert_close(name, moved[name], value)


def test_a_sampled_pass_is_one_graph():
    model, batch = remix(base=tiny_llama(layers=1).eval()), batch_of()

    def run(call):
        model.zero_grad()
        torch.manual_seed(0)
        with policy_gradient(model) as state:
            loss = call(**batch).loss
            log_probs = [routing.log_prob_N for _, routing, _ in state.context.registered]
            (loss + torch.stack(log_probs[:2]).sum()).backward()
        return loss.detach(), gradients(model)

    loss, expected = run(model)
    found, actual = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert counters["stats"]["unique_graphs"] == 1
    assert_close("loss", found, loss)
    assert any("router" in name for name in expected)
    for name, value in expected.items():
        assert_close(name, actual[name], value)


def test_without_a_policy_gradient_it_is_refused_as_ever():
    compiled = torch.compile(remix(base=tiny_llama(layers=1).eval()), backend="aot_eager")
    with pytest.raises(ConfigError, match="policy"):
        compiled(**batch_of()).loss.backward()
