"""State that moves once an optimizer step: rules, one count a forward, hooks under real optimizers, two processes."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moe_kit.errors import ConfigError
from moe_kit.routing import Router, RoutingContext, install_step_hook, routing_step
from moe_kit.routing.balance import ReLUSparsityLoss, mean_loss, stack_routings
from moe_kit.routing.loss_free import LossFreeBias
from moe_kit.routing.schedule import FreezeSchedule, TwoStageEntropy
from moe_kit.routing.scope import TokenScope
from moe_kit.routing.score import LinearScore
from moe_kit.routing.select import SelectTopK
from moe_kit.routing.step import step_states, track
from moe_kit.routing.threshold import SelectPositive, SparsityController
from moe_kit.routing.weight import ReLUWeight, SigmoidWeight
from tests.distributed.launch import run_two_processes
from tests.tolerances import assert_close

E, K, D = 8, 2, 6


def biased_router(rule="sign", rate=0.01, **options):
    torch.manual_seed(1)
    return Router(
        E,
        scope=TokenScope(),
        score=LinearScore(D, E, init_std=1.0),
        select=SelectTopK(K),
        weight=SigmoidWeight(renormalise=True),
        stepper=LossFreeBias(E, rule=rule, rate=rate, **options),
    )


def skewed(rows=4, length=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, D, generator=generator) + 1.5


def violation(routing):
    load = routing.load_E()
    return float(load.max() / load.mean() - 1)


def test_the_sign_rule_is_the_formula():
    router = biased_router(rate=0.5).train()
    load = router(skewed(), RoutingContext()).load_E()
    routing_step(router)
    assert torch.equal(router.stepper.bias, 0.5 * torch.sign(load.mean() - load))


def test_weights_never_see_the_bias_and_the_bias_gets_no_gradient():
    router = biased_router().train()
    router.stepper.bias.copy_(torch.randn(E))
    routing = router(skewed(), RoutingContext())
    gates = routing.logits_NE.sigmoid().gather(-1, routing.expert_ids_NK)
    assert_close("weights", routing.weights_NK, gates / gates.sum(-1, keepdim=True))
    assert not router.stepper.bias.requires_grad
    biased = (routing.logits_NE.sigmoid() + router.stepper.bias).topk(K).indices
    assert torch.equal(routing.expert_ids_NK.sort().values, biased.sort().values)


@pytest.mark.parametrize(("rule", "steps"), [("sign", 250), ("quantile", 8)])
def test_both_rules_balance_a_skewed_stream(rule, steps):
    router = biased_router(rule).train()
    held_out = skewed(rows=64, seed=99)
    first = violation(router.eval()(held_out))
    router.train()
    for step in range(steps):
        # a smaller step at the end, as in DeepSeek-V3: the sign rule oscillates by its step
        router.stepper.rate = 0.01 if step < 150 else 0.001
        router(skewed(rows=8, seed=step), RoutingContext())
        routing_step(router)
    last = violation(router.eval()(held_out))
    assert first > 0.8
    assert last < 0.15


def test_the_quantile_rule_is_the_quantile():
    router = biased_router("quantile", bins=4000).train()
    router.stepper.bias.copy_(torch.linspace(-0.1, 0.1, E))
    routing = router(skewed(), RoutingContext())
    s = routing.logits_NE.detach().sigmoid()
    alpha = (s + router.stepper.bias).sort(-1, descending=True).values[:, K : K + 1]
    expected = -torch.quantile(s - alpha, 1 - K / E, dim=0)
    routing_step(router)
    assert (router.stepper.bias - (expected - expected.mean())).abs().max() < 5e-3
    assert abs(float(router.stepper.bias.mean())) < 1e-6


def test_counts_only_real_tokens_in_training_and_once_under_recomputation():
    router = biased_router().train()
    x = skewed(2, 8).requires_grad_()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :5] = False
    context = RoutingContext(mask_BS=mask)
    # recomputation would stop as soon as it has the tensors it needs, which is before the count
    with set_checkpoint_early_stop(False):
        out = checkpoint(lambda v: router(v, context).weights_NK.sum(), x, use_reentrant=False)
    context.is_open = False
    out.backward()
    assert router.stepper.counter.sum() == 11 * K
    router.eval()
    router(x, RoutingContext())
    assert router.stepper.counter.sum() == 11 * K


def test_micro_batches_of_a_step_add_up():
    one, two = biased_router().train(), biased_router().train()
    x = skewed(4)
    one(x, RoutingContext())
    for row in x:
        two(row[None], RoutingContext())
    assert torch.equal(one.stepper.counter, two.stepper.counter)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    ],
    ids=["sgd", "adamw", "fused", "foreach"],
)
@pytest.mark.parametrize("how", ["tracked", "installed", "both"])
def test_any_optimizer_moves_the_state_once_a_step(make, how):
    router = biased_router().train()
    optimizer = make(router.parameters())
    if how != "installed":
        track(router)
    if how != "tracked":
        install_step_hook(optimizer, router)
    for _ in range(3):
        for _ in range(2):
            router(skewed(), RoutingContext()).weights_NK[:, 0].sum().backward()
            assert router.stepper.counter is not None
        before = router.stepper.bias.clone()
        optimizer.step()
        optimizer.zero_grad()
        assert router.stepper.counter is None
        moved = (router.stepper.bias - before).abs()
        assert moved.max() <= 0.01 + 1e-7, "moved more than once"
        assert moved.max() > 0


def test_only_the_optimizer_of_the_model_moves_it():
    router, other = biased_router().train(), torch.nn.Linear(2, 2)
    track(router)
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    second = torch.optim.SGD([router.scorer.weight], lr=0.0)
    router(skewed(), RoutingContext())
    other(torch.ones(1, 2)).sum().backward()
    stranger.step()
    assert router.stepper.counter is not None
    second.step()
    moved = router.stepper.bias.clone()
    assert moved.abs().sum() > 0
    # a step without a forward in between moves nothing
    second.step()
    assert torch.equal(router.stepper.bias, moved)


def test_state_survives_copying_and_saving_but_counters_are_not_saved():
    router = biased_router().train()
    router(skewed(), RoutingContext())
    routing_step(router)
    router(skewed(), RoutingContext())
    again = biased_router()
    again.load_state_dict(router.state_dict())
    assert torch.equal(again.stepper.bias, router.stepper.bias)
    assert not any("counter" in name for name in router.state_dict())
    assert torch.equal(copy.deepcopy(router).stepper.bias, router.stepper.bias)


def test_biases_stay_float32():
    router = biased_router().to(torch.bfloat16)
    assert router.stepper.bias.dtype == torch.float32
    assert router.double().stepper.bias.dtype == torch.float64


def relu_router():
    torch.manual_seed(1)
    return Router(
        E,
        scope=TokenScope(),
        score=LinearScore(D, E, init_std=0.3),
        select=SelectPositive(),
        weight=ReLUWeight(),
        losses={"relu_l1": (1.0, ReLUSparsityLoss(K))},
        stepper=SparsityController(E, K, initial=1e-4),
    )


def test_sparsity_controller_follows_its_formula_and_is_one_for_the_model():
    pair = torch.nn.ModuleList([relu_router(), relu_router()]).train()
    with torch.no_grad():
        pair[1].scorer.weight.abs_()
    x = skewed()
    routings = [router(x, RoutingContext()) for router in pair]
    active = sum(routing.load_E().sum() for routing in routings) / (2 * routings[0].num_decisions * E)
    direction = torch.sign((1 - K / E) - (1 - active))
    routing_step(pair)
    expected = torch.tensor(1e-4) * 1.2**direction
    for router in pair:
        assert_close("lambda", router.stepper.strength[0], expected)
        assert_close("coefficient", router.coefficient("relu_l1"), expected)


def test_relu_routing_settles_at_k_experts():
    router = relu_router().train()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    install_step_hook(optimizer, router)
    target = torch.randn(E)
    active = []
    for step in range(250):
        routing = router(skewed(2, 64, seed=step), RoutingContext())
        task = (routing.dense_NE() - target.relu()).square().mean() * 0.1
        sparsity = mean_loss(router.losses["relu_l1"][1], stack_routings([routing]))
        (task + router.coefficient("relu_l1") * sparsity).backward()
        optimizer.step()
        optimizer.zero_grad()
        active.append(float(routing.load_E().sum() / routing.num_decisions))
    assert active[0] > 3.5
    assert abs(sum(active[-60:]) / 60 - K) < 0.7


def entropy_router(logits_scale, **options):
    router = Router(
        E,
        scope=TokenScope(),
        score=LinearScore(D, E, init_std=logits_scale),
        select=SelectTopK(K),
        weight=SigmoidWeight(),
        stepper=TwoStageEntropy(**options),
    )
    return router.train()


def test_the_latch_falls_once_after_patience_steps_in_a_row():
    router = entropy_router(0.0, threshold=0.9, patience=3, ramp_steps=4, decay=0.0)
    schedule = router.stepper
    factors = []
    for step in range(9):
        # the third pass is peaked: the streak starts again
        with torch.no_grad():
            router.scorer.weight.copy_(torch.randn(E, D) * 9 if step == 2 else torch.zeros(E, D))
        router(skewed(), RoutingContext())
        routing_step(router)
        factors.append(float(schedule.loss_factor("minimise_token_entropy")))
    assert float(schedule.switched_at) == 6
    assert factors == [0, 0, 0, 0, 0, 0, 0.25, 0.5, 0.75]
    for _ in range(3):
        with torch.no_grad():
            router.scorer.weight.normal_(std=9.0)
        router(skewed(), RoutingContext())
        routing_step(router)
    assert float(schedule.switched_at) == 6, "one way"
    assert float(schedule.loss_factor("minimise_token_entropy")) == 1.0
    assert float(schedule.loss_factor("maximise_token_entropy")) == 0.0
    assert schedule.loss_factor("maximise_mean_entropy") == 1.0
    again = entropy_router(0.0, threshold=0.9, patience=3, ramp_steps=4, decay=0.0)
    again.load_state_dict(router.state_dict())
    assert float(again.stepper.ramp) == float(schedule.ramp), "a resumed run keeps its stage"


def test_the_cap_ends_stage_one():
    router = entropy_router(9.0, threshold=1.0, patience=99, max_steps=2)
    for _ in range(4):
        router(skewed(), RoutingContext())
        routing_step(router)
    assert float(router.stepper.switched_at) == 2
    with pytest.raises(ConfigError, match="patience 0"):
        TwoStageEntropy(patience=0)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_a_frozen_router_is_bit_constant_while_the_rest_trains(optimizer_class):
    def make():
        torch.manual_seed(1)
        return Router(
            E,
            scope=TokenScope(),
            score=LinearScore(D, E, init_std=1.0),
            select=SelectTopK(K),
            weight=SigmoidWeight(),
            freeze_after=2,
        ).train()

    router, expert = make(), torch.nn.Linear(D, 1)
    optimizer = optimizer_class([*router.parameters(), *expert.parameters()], lr=0.1, weight_decay=0.1)
    install_step_hook(optimizer, router)
    values, experts = [], []
    for step in range(5):
        x = skewed(seed=step)
        (router(x, RoutingContext()).weights_NK.sum() + expert(x).sum()).backward()
        optimizer.step()
        values.append(router.scorer.weight.detach().clone())
        experts.append(expert.weight.detach().clone())
        if step == 3:
            # resuming takes the saved values as the frozen ones
            resumed = make()
            resumed.load_state_dict(router.state_dict())
            router.load_state_dict(resumed.state_dict())
            router.freeze.kept = None
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])
    assert torch.equal(values[1], values[4])
    assert not torch.equal(experts[3], experts[4])
    with pytest.raises(ConfigError):
        FreezeSchedule(-1, [])


def test_step_states_are_found_in_module_order():
    router = biased_router()
    assert step_states(router) == [router.stepper]


WORKER = """
from torch.nn.parallel import DistributedDataParallel
from moe_kit.routing import RoutingContext
from moe_kit.routing.step import track
from tests.routing.step_parts import parts, stream

model = parts()
track(model)
ddp = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
for x in stream():
    ddp(x[rank::2]).backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save({k: v for k, v in model.state_dict().items() if v.dtype == torch.float32}, f"{folder}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_move_like_one(tmp_path):
    from tests.routing.step_parts import parts, stream

    run_two_processes(WORKER, tmp_path)
    model = parts()
    track(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for x in stream():
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.state_dict()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    moved = 0
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), f"{name} differs between the processes"
        if "scorer" not in name:
            assert_close(name, value, expected[name])
            moved += int((value != 0).any())
    assert moved >= 4
