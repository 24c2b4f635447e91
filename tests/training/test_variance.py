"""The estimate of the policy gradient's variance, by enumeration of everything that can be sampled.

1. on a table of losses, its expectation over all draws of M samples is the exact variance of the estimator (M = 4), the
   exact second moment (M = 2), and the control without the correction is off;
2. on a model, the figures are those of the formula written out for two experts, under both credits;
3. the trainer logs both in one run, and leaves out the one that does not hold.
"""

from itertools import product

import pytest
import torch
from transformers import BertForMaskedLM, TrainingArguments

from moe_kit import RoutedTrainer
from moe_kit.routing import policy_gradient
from moe_kit.training.rloo import PolicySample, at_their_columns, policy_loss, sample_of, token_losses
from moe_kit.training.trainer import PolicyConfig
from moe_kit.training.variance import credit_variance, estimator_variance
from tests.tiny import batch_of
from tests.training.test_rloo import arguments, bert_policy, dataset, remix_model

# two decisions between two experts; the second label's loss depends on both
PROBABILITY = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
FIRST = torch.tensor([1.0, 3.0], dtype=torch.float64)
SECOND = torch.tensor([[2.0, 0.5], [1.0, 4.0]], dtype=torch.float64)


def outcomes():
    """(law, losses [2], scores [2, E]) of every pair of choices."""
    for one, two in product(range(2), repeat=2):
        scores = torch.nn.functional.one_hot(torch.tensor([one, two]), 2) - PROBABILITY
        losses = torch.stack([FIRST[one], SECOND[one, two]])
        yield PROBABILITY[0, one] * PROBABILITY[1, two], losses, scores


def drawn(samples, credit):
    """Every draw of M samples: its law, the charges [M, N] and the scores [M, 1, N, E]."""
    for draw in product(list(outcomes()), repeat=samples):
        law = torch.stack([part[0] for part in draw]).prod()
        losses = torch.stack([part[1] for part in draw])
        to_go = losses.flip(-1).cumsum(-1).flip(-1)
        charge = to_go if credit == "to_go" else to_go[:, :1].expand(-1, 2)
        yield law, charge, torch.stack([part[2] for part in draw])[:, None]


def exact(samples, credit):
    """Mean, variance and second moment of the estimator, written as a loop over decisions."""
    mean, second = torch.zeros(2, 2, dtype=torch.float64), 0.0
    for law, charge, score in drawn(samples, credit):
        gradient = torch.zeros_like(mean)
        for n in range(2):
            for m in range(samples):
                others = (charge[:, n].sum() - charge[m, n]) / (samples - 1)
                gradient[n] += (charge[m, n] - others) / samples * score[m, 0, n]
        mean, second = mean + law * gradient, second + law * gradient.square().sum()
    return mean, second - mean.square().sum(), second


@pytest.mark.parametrize("credit", ["sequence", "to_go"])
@pytest.mark.parametrize("samples", [2, 4])
def test_expectation_of_the_estimate(samples, credit):
    _, variance, second = exact(samples, credit)
    found = sum(law * estimator_variance(score, charge) for law, charge, score in drawn(samples, credit))
    torch.testing.assert_close(found, variance if samples == 4 else second)
    assert abs(second - variance) > 1e-2 * second, "the two must be told apart"


def test_both_credits_share_their_mean_so_differences_are_those_of_the_variances():
    (mean, variance, second), (mean_to_go, variance_to_go, second_to_go) = exact(2, "sequence"), exact(2, "to_go")
    torch.testing.assert_close(mean, mean_to_go)
    torch.testing.assert_close(second - second_to_go, variance - variance_to_go)


def test_figures_of_a_model_are_the_formula_written_out():
    """One router, two experts, one of them chosen: the score is the choice less its probability."""
    model, batch = remix_model(), batch_of(rows=2, length=4)
    batch["attention_mask"][0, :2] = 0
    batch["labels"][0, :3] = -100
    samples, choices, logits = [], [], []
    with policy_gradient(model) as state:
        for _ in range(3):
            out = model(**batch)
            losses = token_losses(out.logits.detach(), batch["labels"])
            samples.append(sample_of(state, losses, "sequence"))
            ((_, routing, _),) = state.context.registered
            choices.append(routing.expert_ids_NK[:, 0].view(2, 4))
            logits.append(routing.logits_NE.detach().view(2, 4, 2))
    expected = {"sequence": 0.0, "to_go": 0.0}
    for credit, row, column in product(expected, range(2), range(4)):
        if not batch["attention_mask"][row, column]:
            continue
        start = column if credit == "to_go" else 0
        charge = [sample.losses_BS[row, start:].sum() / 7.0 for sample in samples]
        gradient = 0.0
        for m in range(3):
            one_hot = torch.eye(2)[choices[m][row, column]]
            score = one_hot - logits[m][row, column].softmax(-1)
            gradient = gradient + (charge[m] - sum(charge) / 3) / 2 * score
        expected[credit] += float(gradient.square().sum())
    for credit, value in expected.items():
        assert float(credit_variance(samples, 7.0, credit)) == pytest.approx(value, rel=1e-4)
    assert expected["sequence"] != pytest.approx(expected["to_go"], rel=1e-2)


def run(tmp_path, model, **policy):
    trainer = RoutedTrainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2),
        train_dataset=dataset(),
        policy=PolicyConfig(**policy),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "policy_loss_std" in entry]


@pytest.mark.parametrize("credit", ["sequence", "to_go"])
def test_one_run_logs_both(tmp_path, credit):
    for entry in run(tmp_path, remix_model(), num_samples=4, credit=credit):
        for name in ("policy_variance_sequence", "policy_variance_to_go"):
            assert abs(entry[name]) > 0


def test_a_line_is_the_mean_over_its_micro_batches(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "moe_kit.training.trainer.credit_variance",
        lambda samples, items, credit: seen.append(credit_variance(samples, items, credit)) or seen[-1],
    )
    lines = run(tmp_path, remix_model(), num_samples=2)
    assert len(seen) == 8, "two credits, two micro-batches, two steps"
    for line, part in zip(lines, (seen[:4], seen[4:])):
        assert line["policy_variance_sequence"] == pytest.approx(float(part[0] + part[2]) / 2)
        assert line["policy_variance_to_go"] == pytest.approx(float(part[1] + part[3]) / 2)


def test_a_credit_that_does_not_hold_is_left_out(tmp_path):
    (line, _) = run(tmp_path, remix_model(scope="sequence"), num_samples=2)
    assert "policy_variance_sequence" in line
    assert "policy_variance_to_go" not in line
    masked = bert_policy(BertForMaskedLM, tmp_path)
    assert "policy_variance_sequence" in masked._policy_metrics
    assert "policy_variance_to_go" not in masked._policy_metrics


def test_losses_of_kept_columns_stand_where_they_belong():
    losses = torch.tensor([[1.0, 2.0]])
    assert at_their_columns(losses, torch.tensor([1, 3]), 4).tolist() == [[0, 1, 0, 2]]
    assert at_their_columns(losses, 2, 4).tolist() == [[0, 0, 1, 2]]
    assert at_their_columns(losses, None, 2) is losses


@pytest.mark.parametrize("credit", ["sequence", "to_go"])
def test_a_head_on_some_columns_gives_the_same_gradient(tmp_path, credit):
    """Labels stand at the end, so the losses of the columns before are zero whether the head ran there or not."""
    batch = batch_of(rows=2, length=6)
    batch["labels"][:, :4] = -100
    cut = {**batch, "labels": batch["labels"][:, 3:], "logits_to_keep": torch.arange(3, 6)}
    gradients = []
    for given in (batch, cut):
        model = remix_model()
        trainer = RoutedTrainer(
            model=model,
            args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
            policy=PolicyConfig(num_samples=2, credit=credit),
        )
        torch.manual_seed(5)
        trainer.compute_loss(model, dict(given)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


def test_samples_without_scores_have_no_figure():
    losses = torch.ones(1, 2)
    samples = [PolicySample(losses, torch.zeros(1)), PolicySample(losses, torch.zeros(1))]
    assert credit_variance(samples, 1.0, "sequence") is None
    assert float(policy_loss(samples, 1.0, "sequence")) == 0
