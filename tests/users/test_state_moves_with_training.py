"""Balance biases, thresholds and controllers move by the passes that train, and by nothing else."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_kit import RoutedAdapterConfig, RoutedTrainer, Router, RoutingError, routing_step
from moe_kit.routing import policy_gradient
from moe_kit.routing.frozen import frozen_parameters
from moe_kit.routing.step import step_states
from tests.distributed.launch import run_two_processes
from tests.tiny import batch_of, quiet_arguments, tiny_llama, wake_banks

CASES = {
    "loss_free": {},
    "loss_free/quantile": {"stepper_options": {"rule": "quantile", "bins": 50}},
    "flylora": {},
    "remoe": {},
    "expert_choice": {"select_options": {"threshold": "ema"}},
    "mixture_of_lora": {"stepper": "two_stage_entropy", "losses": {"maximise_token_entropy": 0.1}},
}


def config(case="loss_free", **overrides):
    values = {"num_experts": 4, "top_k": 2, "r": 3, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    return RoutedAdapterConfig.from_preset(case.split("/")[0], **{**values, **CASES[case], **overrides})


def wrapped(case="loss_free", **overrides):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), config(case, **overrides))
    wake_banks(model)
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, Router) and hasattr(module.scorer, "weight"):
            torch.nn.init.normal_(module.scorer.weight)
    return model.train()


def sgd(model, lr=0.1):
    return torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=lr)


def state(model, adapter="default"):
    return {name: v.clone() for name, v in model.named_parameters() if f".{adapter}." in name and is_state(model, v)}


def is_state(model, value):
    return any(value is other for other in frozen_parameters(model)) and value.dim() == 1


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def train_once(model, before=(), after=()):
    """One step; `before` and `after` are passes around the one that trains."""
    optimizer = sgd(model)
    for extra in before:
        extra(model)
    loss = model(**batch_of()).loss
    for extra in after:
        extra(model)
    loss.backward()
    optimizer.step()
    return state(model)


OTHER = {"input_ids": torch.full((8, 12), 7)}


def without_gradient(model):
    with torch.no_grad():
        model(**OTHER)


def rollout(model):
    model.generate(input_ids=torch.full((4, 3), 9), max_new_tokens=4, do_sample=True)


def died_in_forward(model):
    def fail(*args):
        raise RuntimeError("out of memory")

    handle = model.get_base_model().lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        model(**OTHER, labels=OTHER["input_ids"])
    handle.remove()


def died_in_backward(model):
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory")

    layer = model.get_base_model().model.layers[1]
    handle = layer.register_forward_pre_hook(lambda module, args: (Fail.apply(args[0]), *args[1:]))
    with pytest.raises(RuntimeError):
        model(**OTHER, labels=OTHER["input_ids"]).loss.backward()
    handle.remove()
    model.zero_grad()


def interrupted(model):
    def stop(*args):
        raise KeyboardInterrupt

    handle = model.get_base_model().lm_head.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**OTHER)
    handle.remove()


def evaluated(model):
    model.eval()
    model(**OTHER)
    model.train()


def disabled(model):
    with model.disable_adapter():
        model(**OTHER)


NOT_TRAINING = [without_gradient, rollout, died_in_forward, died_in_backward, interrupted, evaluated, disabled]


@pytest.mark.parametrize("extra", NOT_TRAINING, ids=lambda extra: extra.__name__)
@pytest.mark.parametrize("case", CASES)
def test_passes_that_train_nothing_move_nothing(case, extra):
    fresh = state(wrapped(case))
    expected = train_once(wrapped(case))
    assert not same(fresh, expected)
    assert same(train_once(wrapped(case), before=[extra]), expected)
    if extra not in (died_in_backward, evaluated):
        assert same(train_once(wrapped(case), after=[extra]), expected)


@pytest.mark.parametrize("case", CASES)
def test_only_passes_that_train_nothing_and_a_step(case):
    model = wrapped(case)
    before = state(model)
    optimizer = sgd(model)
    without_gradient(model)
    died_in_forward(model)
    optimizer.step()
    routing_step(model)
    assert same(state(model), before)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_of_a_pass_stays(case):
    """TRL switches to an adapter "ref" for a pass, which gives that one gradients for a moment."""
    model = wrapped(case)
    model.add_adapter("ref", model.peft_config["default"])
    expected = train_once(wrapped(case))
    kept, optimizer = state(model, "ref"), sgd(model)
    for gradients in (False, True):
        model.set_adapter("ref")
        with torch.set_grad_enabled(gradients):
            model(**OTHER)
        model.set_adapter("default")
    model(**batch_of()).loss.backward()
    optimizer.step()
    assert same(state(model), expected)
    assert same(state(model, "ref"), kept)


@pytest.mark.parametrize("case", ["loss_free", "flylora"])
def test_an_adapter_moves_with_its_own_optimizer(case):
    """Two adapters run together, each has an optimizer."""
    model = wrapped(case)
    model.add_adapter("second", config(case))
    model.base_model.set_adapter(["default", "second"])
    optimizers = {
        name: torch.optim.SGD([v for n, v in model.named_parameters() if f".{name}." in n and v.requires_grad], lr=0.1)
        for name in ("default", "second")
    }
    model(**batch_of()).loss.backward()
    fresh = {name: state(model, name) for name in optimizers}
    optimizers["second"].step()
    assert same(state(model), fresh["default"])
    assert not same(state(model, "second"), fresh["second"])
    optimizers["default"].step()
    assert not same(state(model), fresh["default"])


@pytest.mark.parametrize("case", ["loss_free", "flylora", "remoe"])
def test_frozen_adapters_stay(case, tmp_path):
    wrapped(case).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path).train()
    # nothing of this adapter is trained, but something else is
    model.get_base_model().lm_head.weight.requires_grad_(True)
    before, optimizer = state(model), sgd(model)
    model(**batch_of()).loss.backward()
    optimizer.step()
    routing_step(model)
    assert same(state(model), before)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_every_pass_once(case, reentrant):
    if reentrant and config(case).losses:
        pytest.skip("auxiliary losses are refused under reentrant checkpointing")
    model = wrapped(case)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert same(train_once(model), train_once(wrapped(case)))


@pytest.mark.parametrize("case", CASES)
def test_all_micro_batches_of_a_step_count(case):
    whole, parts = wrapped(case), wrapped(case)
    batch = batch_of(4)
    optimizer = sgd(parts, lr=0.0)
    for row in range(0, 4, 2):
        parts(**{name: value[row : row + 2] for name, value in batch.items()}).loss.backward()
    totals = [entry.counter.clone() for entry in step_states(parts)]
    sizes = [entry for entry in totals if entry.any()]
    assert sizes
    optimizer.step()
    whole(**batch).loss.backward()
    for one, two, entry in zip(totals, [entry.counter for entry in step_states(whole)], step_states(whole)):
        # thresholds are means of cut-offs, one a pass
        if type(entry).__name__ != "SelectEMAThreshold":
            assert torch.allclose(one, two, rtol=1e-5)
    assert all(entry.counter is None and not entry.passes for entry in step_states(parts))


def test_samples_of_a_policy_gradient_count():
    """They run forward only, and train the router by their rewards."""
    model = wrapped("loss_free", select="sample_k", scope="token")
    with policy_gradient(model), torch.no_grad():
        model(**batch_of())
    assert all(entry.counter is not None for entry in step_states(model))


def test_two_backward_passes_through_one_forward_count_once():
    model = wrapped()
    optimizer = sgd(model)
    loss = model(**batch_of()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert same(state(model), train_once(wrapped()))


def test_a_smaller_batch_after_running_out_of_memory(tmp_path):
    """`auto_find_batch_size` starts again with half the rows when a batch does not fit."""
    examples = [{name: value[row] for name, value in batch_of(4).items()} for row in range(4)]

    def run(limit, **arguments):
        model = wrapped()

        def fail(module, args, kwargs):
            if kwargs["input_ids"].shape[0] > limit:
                raise RuntimeError("CUDA out of memory.")

        # behind the routers, so that their pass is under way
        model.get_base_model().model.layers[1].mlp.register_forward_hook(
            lambda module, args, output: fail(module, args, {"input_ids": output})
        )
        trainer = RoutedTrainer(
            model=model,
            args=quiet_arguments(tmp_path, max_steps=2, lr_scheduler_type="constant", **arguments),
            train_dataset=examples,
        )
        trainer.train()
        return state(model)

    found = run(2, per_device_train_batch_size=4, auto_find_batch_size=True)
    assert same(found, run(math.inf, per_device_train_batch_size=2))


class Partitioning:
    """What ZeRO does to an optimizer: it holds one flat copy of all parameters and is known by a mark on these."""

    def __init__(self, model, marked=True):
        self.values = [value for value in model.parameters() if value.requires_grad]
        self.flat = torch.nn.Parameter(torch.cat([value.detach().flatten() for value in self.values]))
        self.optimizer = torch.optim.SGD([self.flat], lr=0.1)
        for value in self.values:
            value._dp_group = None
        if marked:
            # a process has such links for the parameters of its own part
            self.values[0]._zero_optimizer = self

    def step(self):
        self.flat.grad = torch.cat([value.grad.flatten() for value in self.values])
        self.optimizer.step()
        torch.nn.utils.vector_to_parameters(self.flat.detach(), self.values)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_of_flat_partitions_moves_the_state(case, marked):
    model, other = wrapped(case), wrapped(case)
    engine, second = Partitioning(model, marked), Partitioning(other)
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    before = state(model)
    for each in (model, other):
        each(**batch_of()).loss.backward()
    stranger.step()
    assert same(state(model), before)
    if marked:
        second.step()
        assert same(state(model), before), "moved by another engine"
    engine.step()
    assert same(state(model), train_once(wrapped(case)))


def test_a_router_cannot_be_put_back_into_partitions():
    model = wrapped("loss_free", router_freeze_after=1)
    engine = Partitioning(model)
    model(**batch_of()).loss.backward()
    with pytest.raises(RoutingError, match="freeze_router=True"):
        engine.step()


WORKER = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.users.test_state_moves_with_training import SHARDED, train_rows, wrapped

mesh = init_device_mesh("cpu", (2,))
found = {}
for case, overrides in SHARDED:
    model = wrapped(case, **overrides)
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None and not value.is_contiguous():
                module._parameters[name] = torch.nn.Parameter(value.detach().contiguous(), value.requires_grad)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train_rows(model, [(rank,), (2 + rank,)], parts=2)
    found[case] = {name: value.full_tensor().detach() for name, value in model.named_parameters()}
if rank == 0:
    torch.save(found, f"{folder}/found.pt")
"""
SHARDED = [
    ("loss_free", {"router_freeze_after": 2}),
    ("remoe", {}),
    ("expert_choice", {}),
    ("mixture_of_lora", {}),
]


def train_rows(model, passes, parts, steps=3):
    """Steps of several passes over rows of a batch, each pass one of `parts` equal parts."""
    batch, optimizer = batch_of(4), sgd(model)
    for _ in range(steps):
        for rows in passes:
            (model(**{name: value[list(rows)] for name, value in batch.items()}).loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_sharded_state_moves_as_in_one_process(tmp_path):
    run_two_processes(WORKER, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    for case, overrides in SHARDED:
        model = wrapped(case, **overrides)
        fresh = state(model)
        train_rows(model, [(0,), (1,), (2,), (3,)], parts=4)
        assert not same(state(model), fresh)
        for name, value in model.named_parameters():
            assert torch.allclose(found[case][name], value, atol=2e-4), f"{case}: {name}"


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("case", CASES)
def test_optimizers_that_step_inside_the_backward(case, reentrant):
    """One optimizer a parameter, as in the layerwise ones of trainers, moves the state as one for all does."""
    if reentrant and config(case).losses:
        pytest.skip("auxiliary losses are refused under reentrant checkpointing")
    states = []
    for layerwise in (False, True):
        model = wrapped(case)
        if reentrant is not None:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        if layerwise:
            of = {value: torch.optim.SGD([value], lr=0.0) for value in model.parameters() if value.requires_grad}
            for value in of:
                value.register_post_accumulate_grad_hook(lambda value, of=of: of[value].step())
        else:
            optimizer = sgd(model, lr=0.0)
        fresh = state(model)
        for _ in range(3):
            model(**batch_of()).loss.backward()
            if not layerwise:
                optimizer.step()
        assert not same(state(model), fresh)
        assert all(entry.counter is None and not entry.passes for entry in step_states(model))
        states.append(state(model))
    assert same(*states)


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_which_the_only_backward_died_moves_nothing(case):
    model = wrapped(case)
    optimizer = sgd(model)
    model(**batch_of()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = state(model)
    died_in_backward(model)
    optimizer.step()
    assert same(state(model), before)
    assert all(entry.counter is None and not entry.passes for entry in step_states(model))


def test_passes_without_a_step_are_not_kept():
    model = wrapped()
    for _ in range(3):
        model(**batch_of())
        model(**batch_of()).loss.backward()
        died_in_backward(model)
        assert all(len(entry.passes) <= 1 for entry in step_states(model))
    optimizer = sgd(model, lr=0.0)
    expected = wrapped()
    for _ in range(6):
        expected(**batch_of())
    routing_step(expected)
    optimizer.step()
    assert same(state(model), state(expected))
