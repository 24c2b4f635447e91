"""The policy gradient of a whole model, by enumeration, and the trainer around it.

1. expectation over all pairs of selections of a tiny Llama equals the gradient of the expected loss, for both
   credits; charging a decision with its own token alone is biased;
2. layers below the first adapter run once for all samples and change nothing;
3. a policy router refuses trainers that would leave it without a gradient; it learns under ours.
"""

from itertools import product

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    Trainer,
    TrainingArguments,
)

from moe_kit import ConfigError, RoutedAdapterConfig, RoutedTrainer, record_routing, replay_routing
from moe_kit.routing import policy_gradient
from moe_kit.training.prefix import first_adapted_layer, shared_prefix
from moe_kit.training.rloo import PolicySample, has_policy, policy_loss, sample_of, token_losses
from moe_kit.training.trainer import PolicyConfig, param_groups
from tests.tiny import batch_of, quiet_arguments, tiny_llama, wake_banks


def remix_model(layers=(0,), targets=("down_proj",), num_experts=2, top_k=1, depth=2, **overrides):
    config = RoutedAdapterConfig.from_preset(
        "remix",
        num_experts=num_experts,
        top_k=top_k,
        r=2,
        target_modules=list(targets),
        layers_to_transform=list(layers),
        score_options={"init_std": 0.5},
        task_type="CAUSAL_LM",
        **overrides,
    )
    model = get_peft_model(tiny_llama(depth), config, adapter_name="policy")
    wake_banks(model, std=2.0)
    return model.train()


@pytest.fixture(scope="module")
def enumeration():
    """Every selection of a three-token sequence: its losses, its log-probabilities, and the router's gradient."""
    model, batch = remix_model(), batch_of(rows=1, length=4)
    (router,) = [parameter for name, parameter in model.named_parameters() if "router" in name]
    outcomes = {"sequence": [], "to_go": []}
    with policy_gradient(model) as state:
        with record_routing(model) as record:
            model(**batch)
        (site,) = record
        for choice in product(range(2), repeat=4):
            with replay_routing(model, {site: torch.tensor(choice)[:, None]}):
                out = model(**batch)
            losses = token_losses(out.logits.detach(), batch["labels"])
            for credit, samples in outcomes.items():
                samples.append(sample_of(state, losses, credit))
    law = torch.stack([sample.log_prob.sum() for sample in outcomes["sequence"]]).exp()
    total = torch.stack([sample.losses_BS.sum() for sample in outcomes["sequence"]])
    (exact,) = torch.autograd.grad((law * total).sum(), router, retain_graph=True)
    return outcomes, law.detach(), exact, router


def expectation(samples, law, credit, router):
    surrogate = sum(
        law[a] * law[b] * policy_loss([samples[a], samples[b]], 1.0, credit)
        for a, b in product(range(len(samples)), repeat=2)
    )
    (gradient,) = torch.autograd.grad(surrogate, router, retain_graph=True)
    return gradient


def test_enumeration_covers_the_law(enumeration):
    _, law, exact, _ = enumeration
    assert law.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert exact.abs().max() > 1e-3, "the toy must have something to learn"


@pytest.mark.parametrize("credit", ["sequence", "to_go"])
def test_policy_gradient_is_unbiased(enumeration, credit):
    outcomes, law, exact, router = enumeration
    estimate = expectation(outcomes[credit], law, credit, router)
    torch.testing.assert_close(estimate, exact, rtol=2e-3, atol=2e-5)


def test_own_token_credit_is_biased(enumeration):
    """The known wrong version: a decision charged only with its own position ignores later tokens."""
    outcomes, law, exact, router = enumeration
    samples = outcomes["to_go"]
    # undo the reverse cumulative sum in advance: differences of the losses add up to the own loss
    wrong = [
        PolicySample(s.losses_BS - torch.nn.functional.pad(s.losses_BS[:, 1:], (0, 1)), s.log_prob) for s in samples
    ]
    gap = (expectation(wrong, law, "to_go", router) - exact).abs().max()
    assert gap > 20 * 2e-5


def test_to_go_has_lower_variance(enumeration):
    outcomes, law, _, router = enumeration
    second = {}
    for credit, samples in outcomes.items():
        second[credit] = sum(
            law[a]
            * law[b]
            * torch.autograd.grad(policy_loss([samples[a], samples[b]], 1.0, credit), router, retain_graph=True)[0]
            .square()
            .sum()
            for a, b in product(range(len(samples)), repeat=2)
        ).item()
    assert second["to_go"] < second["sequence"]


def test_forward_only_pass_keeps_the_routers_gradient():
    model, batch = remix_model(), batch_of()
    with policy_gradient(model) as state, torch.no_grad():
        out = model(**batch)
        sample = sample_of(state, token_losses(out.logits, batch["labels"]), "sequence")
    assert not out.logits.requires_grad
    sample.log_prob.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(gradients) == [name for name in gradients if "router" in name]
    assert gradients


def test_padding_has_no_log_probability():
    model, batch = remix_model().train(), batch_of(rows=1, length=4)
    with policy_gradient(model) as state:
        model(**batch)
        (entry,) = state.context.registered
        padded = {name: torch.nn.functional.pad(value, (2, 0)) for name, value in batch.items()}
        padded["labels"][:, :2] = -100
        ids = torch.cat([torch.ones(2, 1, dtype=torch.long), entry[1].expert_ids_NK])
        with replay_routing(model, {entry[0]: ids}):
            model(**padded)
        (again,) = state.context.registered
    torch.testing.assert_close(again[1].log_prob_B(), entry[1].log_prob_B())


def test_shared_prefix_runs_lower_layers_once():
    model, batch = remix_model(layers=(2,), depth=4), batch_of()
    stack, index = first_adapted_layer(model)
    assert (len(stack), index) == (4, 2)
    calls = []
    handles = [layer.mlp.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(stack)]
    with policy_gradient(model), record_routing(model) as record:
        with shared_prefix(model) as shared:
            first = model(**batch).logits
            ids = dict(record)
            with torch.no_grad(), replay_routing(model, ids):
                second = model(**batch).logits
        with replay_routing(model, ids):
            plain = model(**batch).logits
    for handle in handles:
        handle.remove()
    assert shared
    assert calls == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3]
    assert torch.equal(first, second)
    assert torch.equal(first, plain)


def test_prefix_is_not_shared_when_lower_layers_train():
    model = remix_model(layers=(1,))
    model.get_input_embeddings().weight.requires_grad_(True)
    assert first_adapted_layer(model) == (None, 0)


def arguments(tmp_path, **overrides):
    values = dict(max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1)
    return quiet_arguments(tmp_path, **{**values, **overrides})


def dataset(rows=8):
    batch = batch_of(rows=rows)
    return [{name: value[row] for name, value in batch.items()} for row in range(rows)]


def test_stock_trainer_is_refused_unless_frozen(tmp_path):
    with pytest.raises(ConfigError, match="policy gradient"):
        Trainer(model=remix_model(), args=arguments(tmp_path), train_dataset=dataset()).train()
    frozen = remix_model(freeze_router=True)
    assert not has_policy(frozen)
    Trainer(model=frozen, args=arguments(tmp_path), train_dataset=dataset()).train()


@pytest.mark.parametrize(
    "policy",
    [PolicyConfig(num_samples=2), PolicyConfig(credit="to_go", num_samples=3), PolicyConfig(adapter_gradient="mean")],
    ids=["one", "to_go", "mean"],
)
def test_trainer_moves_router_and_experts(tmp_path, policy):
    model = remix_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = RoutedTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset(), policy=policy)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == set(before)
    assert "policy_loss_std" in trainer.state.log_history[0]


def test_logged_loss_is_the_cross_entropy(tmp_path):
    """The surrogate's value never shows, only its gradient."""
    model = remix_model()
    trainer = RoutedTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset())
    batch = batch_of()
    with record_routing(model) as record:
        # the pass with a graph comes first; stop the record there
        original, seen = model.forward, []

        def spy(*args, **kwargs):
            out = original(*args, **kwargs)
            seen.append(dict(record))
            return out

        model.forward = spy
        loss = trainer.compute_loss(model, dict(batch))
        del model.forward
    with policy_gradient(model), replay_routing(model, seen[0]):
        expected = model(**batch).loss
    torch.testing.assert_close(loss, expected)


def test_policy_learns_the_better_expert(tmp_path):
    """Expert 0 does nothing, expert 1 does harm: the router must come to prefer expert 0."""
    model = remix_model(targets=("down_proj",), layers=(1,))
    for name, parameter in model.named_parameters():
        if "bank" in name:
            parameter.requires_grad_(False)
            if name.endswith(".B"):
                parameter.data[0] = 0.0
                parameter.data[1] *= 3.0
    batch = batch_of(rows=8)

    def share_of_the_good_expert():
        with torch.no_grad(), record_routing(model.eval()) as record:
            model(**batch)
        model.train()
        (ids,) = record.values()
        return (ids == 0).float().mean().item()

    before = share_of_the_good_expert()
    RoutedTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=40, per_device_train_batch_size=8, learning_rate=0.05),
        train_dataset=dataset(),
        policy=PolicyConfig(credit="to_go"),
    ).train()
    assert share_of_the_good_expert() > before + 0.1


def test_router_learning_rate(tmp_path):
    model = remix_model(router_lr=0.5)
    trainer = RoutedTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset())
    rates = {len(group["params"]): group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {2: 1e-2, 1: 0.5}
    assert [group["lr"] for group in param_groups(model, 1e-3, 2e-3)] == [1e-3, 2e-3]


def test_each_adapter_has_its_own_router_learning_rate():
    model = remix_model(router_lr=0.5)
    for name, rate in (("second", 0.25), ("third", None), ("fourth", 0.5), ("frozen", 0.0)):
        sizes = dict(num_experts=2, top_k=1, r=2, target_modules=["down_proj"], layers_to_transform=[0])
        model.add_adapter(name, RoutedAdapterConfig.from_preset("remix", router_lr=rate, **sizes))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    rates = {id(p): group["lr"] for group in param_groups(model, 1e-3) for p in group["params"]}
    expected = {"policy": 0.5, "second": 0.25, "third": 1e-3, "fourth": 0.5, "frozen": 0.0}
    seen = set()
    for name, parameter in model.named_parameters():
        adapter = name.partition(".moe_adapter_router.")[2].partition(".")[0]
        assert rates[id(parameter)] == expected.get(adapter, 1e-3), name
        seen.add(adapter)
    assert seen == {"", *expected}
    # one rate given is for all of them, zero included
    assert [group["lr"] for group in param_groups(model, 1e-3, 2e-3)] == [1e-3, 2e-3]
    assert [group["lr"] for group in param_groups(model, 1e-3, 0.0)] == [1e-3, 0.0]


def test_to_go_needs_token_decisions():
    model = remix_model(scope="sequence")
    batch = batch_of()
    with policy_gradient(model) as state:
        losses = token_losses(model(**batch).logits.detach(), batch["labels"])
        assert sample_of(state, losses, "sequence").log_prob.shape == (2,)
        with pytest.raises(ConfigError, match="one decision a token"):
            sample_of(state, losses, "to_go")


def test_bad_policy():
    with pytest.raises(ConfigError, match="num_samples is 1"):
        PolicyConfig(num_samples=1).validate()
    with pytest.raises(ConfigError, match="credit is 'token'"):
        PolicyConfig(credit="token").validate()


def test_every_sample_reaches_the_router(monkeypatch, tmp_path):
    """The gradient of an optimizer step is the surrogate over all M passes, not over the pass with a graph alone."""
    model = remix_model()
    trainer = RoutedTrainer(
        model=model, args=arguments(tmp_path), train_dataset=dataset(), policy=PolicyConfig(num_samples=3)
    )
    collected = []
    monkeypatch.setattr(
        "moe_kit.training.trainer.policy_loss",
        lambda samples, items, credit: collected.extend(samples) or policy_loss(samples, items, credit),
    )
    loss = trainer.compute_loss(model, batch_of())
    (router,) = [parameter for name, parameter in model.named_parameters() if "router" in name]
    assert len(collected) == 3
    parts = [torch.autograd.grad(s.log_prob.sum(), router, retain_graph=True)[0] for s in collected]
    assert all(part.abs().max() > 0 for part in parts)
    losses = torch.stack([s.losses_BS.sum(-1) for s in collected]) / (batch_of()["labels"][:, 1:].numel())
    advantages = (losses - losses.mean(0)) / 2
    expected = sum(
        torch.autograd.grad((a * s.log_prob).sum(), router, retain_graph=True)[0]
        for a, s in zip(advantages, collected, strict=True)
    )
    loss.backward()
    torch.testing.assert_close(router.grad, expected)


def test_a_forward_only_sample_computes_one_loss(tmp_path):
    """That of its tokens; the model's own is computed where a gradient follows from it."""
    model = remix_model()
    inner, calls = model.get_base_model(), []
    for gradient, expected in (("one", [True]), ("mean", [True, True, True])):
        own = inner.loss_function
        inner.loss_function = lambda *args, own=own, **kw: calls.append(torch.is_grad_enabled()) or own(*args, **kw)
        counting = inner.loss_function
        policy = PolicyConfig(num_samples=3, adapter_gradient=gradient)
        trainer = RoutedTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset(), policy=policy)
        trainer.compute_loss(model.train(), batch_of()).backward()
        assert calls == expected
        assert inner.loss_function is counting
        calls.clear()
        del inner._loss_function
    trainer = RoutedTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset())
    trainer.compute_loss(model.train(), batch_of())
    assert "_loss_function" not in vars(inner)


def policy_gradients(model, checkpointing, batch, tmp_path, **policy):
    model.train().zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = RoutedTrainer(model=model, args=arguments, policy=PolicyConfig(num_samples=3, **policy))
    torch.manual_seed(5)
    trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(10)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sharing", ["input", "block", "model"])
def test_recomputation_finds_the_decisions_of_the_pass_with_a_graph(sharing, tmp_path):
    # all linears of one input width, as a shared router asks
    options = dict(layers=(0, 1), targets=("q_proj", "v_proj", "up_proj"), num_experts=4, router_sharing=sharing)
    plain = policy_gradients(remix_model(**options), False, batch_of(), tmp_path)
    again = policy_gradients(remix_model(**options), True, batch_of(), tmp_path)
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=name)


@pytest.mark.parametrize("sharing", ["input", "block", "model"])
def test_the_mean_of_recomputed_passes_finds_the_decisions_of_each(sharing, tmp_path):
    options = dict(layers=(0, 1), targets=("q_proj", "v_proj", "up_proj"), num_experts=4, router_sharing=sharing)
    plain = policy_gradients(remix_model(**options), False, batch_of(), tmp_path, adapter_gradient="mean")
    again = policy_gradients(remix_model(**options), True, batch_of(), tmp_path, adapter_gradient="mean")
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_passes_that_share_a_prefix_are_recomputed_one_by_one(tmp_path):
    """BERT's query, key and value read the kept output of the layer below itself, the same tensor in every pass."""

    def model():
        torch.manual_seed(0)
        size = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, is_decoder=True)
        values = dict(num_experts=4, top_k=2, r=2, target_modules=["query", "key", "value"], layers_to_transform=[1])
        config = RoutedAdapterConfig.from_preset("remix", layers_pattern="layer", **values)
        routed = get_peft_model(BertLMHeadModel(BertConfig(**size, **quiet)), config)
        wake_banks(routed, std=2.0)
        return routed

    batch = {name: value for name, value in batch_of().items() if name != "attention_mask"}
    plain = policy_gradients(model(), False, batch, tmp_path, adapter_gradient="mean")
    again = policy_gradients(model(), True, batch, tmp_path, adapter_gradient="mean")
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=name)


def bert_policy(kind, tmp_path, **batch):
    torch.manual_seed(0)
    size = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = RoutedAdapterConfig.from_preset("remix", num_experts=4, top_k=2, r=2, target_modules=["query", "value"])
    model = get_peft_model(kind(BertConfig(**size, **quiet)), config).train()
    wake_banks(model, std=2.0)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = RoutedTrainer(model=model, args=arguments, policy=PolicyConfig(num_samples=2))
    trainer.compute_loss(model, {**batch_of(), **batch})
    return trainer


def test_a_masked_language_model_is_charged_with_labels_where_they_stand(tmp_path):
    labels = torch.full((2, 6), -100)
    labels[:, 0] = 5
    trainer = bert_policy(BertForMaskedLM, tmp_path, labels=labels)
    # shifted labels would drop the first column, and all samples would cost nothing
    assert float(trainer._policy_metrics["policy_loss_std"]) > 0


class TestClassification:
    """A sequence has one class: its loss is the cross-entropy of that class, its log Q that of all its tokens."""

    def model(self, base=BertForSequenceClassification, targets=("query",), **overrides):
        torch.manual_seed(0)
        size = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        # the hidden states differ enough for the classes to hang on the experts
        quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5, num_labels=3)
        options = dict(num_experts=2, top_k=1, r=2, target_modules=list(targets), score_options={"init_std": 0.5})
        config = RoutedAdapterConfig.from_preset("remix", task_type="SEQ_CLS", **options, **overrides)
        model = get_peft_model(base(BertConfig(**size, **quiet)), config)
        wake_banks(model, std=3.0)
        return model.train()

    def test_policy_gradient_is_unbiased(self):
        """All selections of two sequences of two tokens each."""
        model, batch, labels = self.model(), batch_of(rows=2, length=2), torch.tensor([0, 2])
        batch["labels"] = labels
        (router,) = [p for name, p in model.named_parameters() if "router" in name and p.requires_grad]
        samples = []
        with policy_gradient(model) as state:
            with record_routing(model) as record:
                model(**batch)
            (site,) = record
            for choice in product(range(2), repeat=4):
                with replay_routing(model, {site: torch.tensor(choice)[:, None]}):
                    out = model(**batch)
                losses = token_losses(out.logits.detach(), labels, shifted=False)
                torch.testing.assert_close(losses.sum() / 2, out.loss.detach())
                samples.append(sample_of(state, losses, "sequence"))
        law = torch.stack([sample.log_prob.sum() for sample in samples]).exp()
        total = torch.stack([sample.losses_BS.sum() for sample in samples])
        (exact,) = torch.autograd.grad((law * total).sum(), router, retain_graph=True)
        assert law.sum().item() == pytest.approx(1.0, abs=1e-5)
        assert exact.abs().max() > 1e-3, "the toy must have something to learn"
        estimate = expectation(samples, law.detach(), "sequence", router)
        torch.testing.assert_close(estimate, exact, rtol=2e-3, atol=2e-5)
        # the known wrong version: each sequence charged with its neighbour's class
        wrong = [PolicySample(sample.losses_BS.flip(0), sample.log_prob) for sample in samples]
        assert (expectation(wrong, law.detach(), "sequence", router) - exact).abs().max() > 20 * 2e-5

    def test_it_trains(self, tmp_path):
        data = [{**row, "labels": torch.tensor(index % 3)} for index, row in enumerate(dataset())]
        model = self.model()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        trainer = RoutedTrainer(model=model, args=arguments(tmp_path), train_dataset=data)
        trainer.train()
        moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
        assert {name for name in moved if "moe_adapter" in name} == {name for name in before if "moe_adapter" in name}
        assert trainer.state.log_history[0]["policy_variance_sequence"] != 0
        assert "policy_variance_to_go" not in trainer.state.log_history[0]

    @pytest.mark.parametrize("labels", [torch.tensor([0.5, 1.0]), torch.ones(2, 3)], ids=["regression", "several"])
    def test_other_losses_are_refused(self, tmp_path, labels):
        with pytest.raises(ConfigError, match=r"labels have shape.*a sampled router is charged with a cross-entropy"):
            bert_policy(BertForSequenceClassification, tmp_path, labels=labels)

    def test_to_go_is_refused(self, tmp_path):
        data = [{**row, "labels": torch.tensor(0)} for row in dataset()]
        trainer = RoutedTrainer(
            model=self.model(), args=arguments(tmp_path), train_dataset=data, policy=PolicyConfig(credit="to_go")
        )
        with pytest.raises(ConfigError, match="a masked language model or a classifier"):
            trainer.train()


def test_batches_of_embeddings_train(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1, disable_tqdm=True)
    data = [{"inputs_embeds": torch.randn(6, 16), "labels": row} for row in batch_of()["labels"]]
    trainer = RoutedTrainer(model=remix_model(), args=arguments, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 1
