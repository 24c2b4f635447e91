"""Banks against a loop over experts and against PEFT's own layers; gradients; fresh banks change nothing."""

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model

from moe_kit import RoutedAdapterConfig, routing_inputs
from moe_kit.errors import ConfigError, RoutingError
from moe_kit.experts import LoRABank, Mixture, RankOneBank, SharedABank, SplitHeadBank
from moe_kit.routing import Router, RoutingContext
from moe_kit.routing.decision import Routing
from moe_kit.routing.scope import TokenScope
from moe_kit.routing.score import FrozenSparseScore, LinearScore
from moe_kit.routing.select import SelectTopK
from moe_kit.routing.weight import RawWeight, SelectedSoftmaxWeight
from tests.tolerances import assert_close

T, E, K, L, D, O = 9, 5, 2, 3, 8, 6


def make(kind, **options):
    torch.manual_seed(1)
    bank = {
        "lora": lambda: LoRABank(D, O, E, L, scale=0.7, **options),
        "shared_a": lambda: SharedABank(D, O, E, L, scale=0.7, **options),
        "rank_one": lambda: RankOneBank(D, O, E, scale=0.7, **options),
        "poly": lambda: SplitHeadBank(D, O, E, L, scale=0.7, **options),
        "mhr": lambda: SplitHeadBank(D, O, E, L, heads=2, scale=0.7, **options),
    }[kind]()
    with torch.no_grad():
        for value in bank.state_dict().values():
            value.copy_(torch.randn_like(value))
    return bank


def sparse_routing(experts, slots=K, holes=True):
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(T, experts, generator=generator).argsort(-1)[:, :slots]
    weights = torch.rand(T, slots, generator=generator)
    if holes:
        ids[0, 0], weights[0, 0] = -1, 0.0
        ids[1], weights[1] = -1, 0.0
    return Routing(num_experts=experts, sparse_ids_NK=ids, sparse_weights_NK=weights.requires_grad_())


def dense_routing(experts):
    weights = torch.rand(T, experts, generator=torch.Generator().manual_seed(3))
    selected = weights > 0.4
    return Routing(num_experts=experts, selected_NE=selected, full_weights_NE=(weights * selected).requires_grad_())


def looped(kind, bank, x, routing):
    """One token and one expert at a time."""
    rows = []
    for t in range(T):
        w = routing.dense_TE()[t]
        if kind == "lora":
            y = sum(w[e] * bank.B[e] @ (bank.A[e] @ x[t]) for e in range(E))
        elif kind == "shared_a":
            y = sum(w[e] * bank.B[e] @ (bank.A @ x[t]) for e in range(E))
        elif kind == "rank_one":
            y = sum(w[e] * bank.B[e, :, 0] for e in range(E))
        else:
            Q = bank.num_groups
            A = torch.cat([sum(w[q * E + s] * bank.A[q * E + s] for s in range(E)) for q in range(Q)], 1)
            B = torch.cat([sum(w[q * E + s] * bank.B[q * E + s] for s in range(E)) for q in range(Q)], 0)
            y = B @ (A @ x[t])
        rows.append(0.7 * y)
    return torch.stack(rows)


KINDS = ["lora", "shared_a", "rank_one", "poly", "mhr"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_output_and_gradients_equal_a_loop(kind, form):
    bank = make(kind)
    routing = sparse_routing(bank.num_experts) if form == "sparse" else dense_routing(bank.num_experts)
    weights = routing.weights_NK
    x = torch.randn(T, D, requires_grad=True)
    inputs = [weights, *bank.parameters(), *([] if kind == "rank_one" else [x])]
    upstream = torch.randn(T, O)
    y, expected = bank(x, routing), looped(kind, bank, x, routing)
    assert_close("y", y, expected)
    found = torch.autograd.grad(y, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for index, (one, two) in enumerate(zip(found, wanted)):
        if index == 0 and form == "sparse":
            # an empty slot has no gradient to compare
            one, two = one[routing.expert_ids_NK >= 0], two[routing.expert_ids_NK >= 0]
        if index == 0 and form == "dense":
            one, two = one[routing.selected_NE], two[routing.selected_NE]
        assert_close(f"gradient {index}", one, two)
    base = torch.randn(T, O)
    assert_close("with base", bank(x, routing, base.clone()), base + expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_experts_gets_zero(kind):
    bank = make(kind)
    routing = sparse_routing(bank.num_experts)
    assert (bank(torch.randn(T, D), routing)[1] == 0).all()


@pytest.mark.parametrize("kind", ["lora", "shared_a", "poly", "mhr"])
def test_constant_weights_are_a_lora(kind):
    bank = make(kind)
    weights = torch.rand(bank.num_experts)
    weights[0] = 0
    routing = Routing(
        num_experts=bank.num_experts,
        selected_NE=torch.ones(T, bank.num_experts, dtype=torch.bool),
        full_weights_NE=weights.expand(T, -1),
    )
    A, B = bank.lora_factors(weights)
    x = torch.randn(T, D)
    assert_close("y", x @ A.T @ B.T, bank(x, routing))


def test_rank_one_is_no_lora_under_constant_weights():
    with pytest.raises(RoutingError, match="RankOneBank"):
        make("rank_one").lora_factors(torch.ones(E))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_keep_their_dtype(kind):
    bank = make(kind)
    routing = dense_routing(bank.num_experts)
    x = torch.randn(T, D)
    for dtype in (torch.bfloat16, torch.float16):
        y = bank(x.to(dtype), routing, torch.zeros(T, O, dtype=dtype))
        assert y.dtype == dtype
        assert_close(f"{kind} {dtype}", y, looped(kind, bank, x, routing), dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["lora", "shared_a", "poly"])
def test_dropout_is_off_in_evaluation(kind):
    bank = make(kind, dropout=0.5)
    routing = dense_routing(E)
    x = torch.randn(T, D)
    assert_close("eval", bank.eval()(x, routing), looped(kind, bank, x, routing))
    assert not torch.equal(bank.train()(x, routing), bank.eval()(x, routing))


def test_heads_must_divide_the_widths():
    with pytest.raises(ConfigError, match="4 heads do not divide"):
        SplitHeadBank(8, 6, 2, 2, heads=4)


def test_frozen_experts_are_saved_parameters_without_a_gradient():
    bank = make("lora", frozen=True)
    assert set(bank.state_dict()) == {"A", "B"} == {name for name, _ in bank.named_parameters()}
    assert not any(value.requires_grad for value in bank.parameters())
    assert not any(value.requires_grad for value in bank.requires_grad_(True).train().parameters())


def flylora(k, rank, detach=False, absolute=False):
    torch.manual_seed(4)
    router = Router(
        rank,
        scope=TokenScope(),
        score=FrozenSparseScore(D, rank, density=0.5),
        select=SelectTopK(k, absolute=absolute),
        weight=RawWeight(),
        detach_input=detach,
    )
    bank = RankOneBank(D, O, rank, scale=2.0)
    torch.nn.init.normal_(bank.B)
    return Mixture(router, bank)


def test_flylora_with_all_experts_is_lora_with_a_frozen_a():
    mixture = flylora(E, E)
    x = torch.randn(1, T, D)
    assert_close("y", mixture(x), 2.0 * (x @ mixture.router.scorer.A.T) @ mixture.bank.B[..., 0])


def test_dropout_reaches_the_choice_of_flylora():
    mixture = flylora(2, E)
    x = torch.randn(1, T, D)
    quiet = mixture(x)
    mixture.router.scorer.dropout = torch.nn.Dropout(0.5)
    torch.manual_seed(8)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(8)
    loud = mixture.train()(x)
    assert_close("training", loud, mixture.eval()(dropped))
    assert_close("evaluation", mixture(x), quiet)


@pytest.mark.parametrize("absolute", [False, True])
def test_flylora_gives_k_columns_a_gradient(absolute):
    mixture = flylora(2, E, absolute=absolute)
    x = torch.randn(1, 1, D)
    mixture(x).sum().backward()
    y = x[0, 0] @ mixture.router.scorer.A.T
    chosen = (y.abs() if absolute else y).topk(2).indices
    used = torch.zeros(E, dtype=torch.bool)
    used[chosen] = True
    assert (mixture.bank.B.grad[~used] == 0).all()
    assert (mixture.bank.B.grad[used] != 0).any(dim=(1, 2)).all()


@pytest.mark.parametrize("detach", [False, True])
def test_flylora_gradient_to_the_input_on_and_off(detach):
    mixture = flylora(2, E, detach=detach)
    x = torch.randn(1, T, D, requires_grad=True)
    (mixture(x).sum() + 0 * x.sum()).backward()
    assert (x.grad.abs().sum() == 0) == detach


@pytest.mark.parametrize("score", ["frozen_sparse", "identity"])
def test_flylora_with_all_experts_and_dropout_is_peft_lora(score):
    """In training, with the same mask: dropout stands where a LoRA has it."""
    lora = get_peft_model(
        OneLinear(), LoraConfig(r=E, lora_alpha=10, lora_dropout=0.5, target_modules=["proj"])
    ).train()
    config = RoutedAdapterConfig.from_preset(
        "flylora", target_modules=["proj"], num_experts=E, top_k=E, lora_alpha=10, dropout=0.5, score=score
    )
    ours = get_peft_model(OneLinear(), config).train()
    theirs, layer = lora.base_model.model.proj, ours.base_model.model.proj
    A = layer.moe_adapter_router["default"].scorer.A
    with torch.no_grad():
        A.copy_(torch.randn(E, D))
        theirs.lora_A["default"].weight.copy_(A)
        B = torch.randn_like(theirs.lora_B["default"].weight)
        theirs.lora_B["default"].weight.copy_(B)
        layer.moe_adapter_bank["default"].B.copy_(B.T[..., None])
    x = torch.randn(2, T, D)
    torch.manual_seed(8)
    expected = theirs(x)
    torch.manual_seed(8)
    assert_close("training", layer(x), expected)
    assert not torch.allclose(layer(x), expected), "another mask"
    assert_close("evaluation", ours.eval().base_model.model.proj(x), lora.eval().base_model.model.proj(x))
    # the score has no dropout of its own where the bank has one
    plain = get_peft_model(
        OneLinear(),
        RoutedAdapterConfig.from_preset("mixture_of_lora", target_modules=["proj"], score=score, dropout=0.5),
    )
    assert plain.base_model.model.proj.moe_adapter_router["default"].scorer.dropout is None


class OneLinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = torch.nn.Linear(D, O)

    def forward(self, x, **kwargs):
        return self.proj(x)


@pytest.mark.parametrize("heads", [1, 2])
def test_poly_and_mhr_equal_peft_poly_on_equal_weights(heads):
    peft_model = get_peft_model(
        OneLinear(), PolyConfig(target_modules=["proj"], r=L, n_tasks=3, n_skills=4, n_splits=heads, init_weights=False)
    ).eval()
    config = RoutedAdapterConfig.from_preset(
        "mhr", target_modules=["proj"], r=L, num_tasks=3, num_experts=4, top_k=1, bank_options={"heads": heads}
    )
    ours = get_peft_model(OneLinear(), config).eval()
    theirs = peft_model.base_model.model.proj
    layer = ours.base_model.model.proj
    with torch.no_grad():
        A = theirs.poly_lora_A["default"]  # heads, skills, D / heads, rank
        layer.moe_adapter_bank["default"].A.copy_(A.transpose(-1, -2).flatten(0, 1))
        layer.moe_adapter_bank["default"].B.copy_(theirs.poly_lora_B["default"].transpose(-1, -2).flatten(0, 1))
        logits = torch.randn(3, heads * 4)
        theirs.poly_router["default"].module_logits.copy_(logits)
        layer.moe_adapter_router["default"].scorer.weight.copy_(logits)
    x = torch.randn(3, 4, D)
    tasks = torch.tensor([2, 0, 1])
    expected = theirs(x, task_ids=tasks)
    with routing_inputs(ours, task_ids=tasks):
        found = ours(x=x)
    assert_close("y", found, expected)
    with routing_inputs(ours, task_ids=[0, 0, 0]):
        assert not torch.allclose(ours(x=x)[0], found[0])


def test_mhr_mu_trains_the_mean_of_the_skills():
    """SGD on equally weighted skills moves their mean at lr / S."""
    bank = make("poly")
    mean_before = bank.B.detach().mean(0)
    single = SplitHeadBank(D, O, 1, L, scale=0.7)
    with torch.no_grad():
        single.A.copy_(bank.A.mean(0, keepdim=True))
        single.B.copy_(mean_before[None])
    x, upstream = torch.randn(T, D), torch.randn(T, O)

    def constant(experts):
        ones = torch.ones(T, experts)
        return Routing(num_experts=experts, selected_NE=ones.bool(), full_weights_NE=ones / experts)

    y = bank(x, constant(E))
    assert_close("y", y, single(x, constant(1)))
    y.backward(upstream)
    single(x, constant(1)).backward(upstream)
    step_of_mean = bank.B.grad.mean(0)
    assert_close("step", step_of_mean, single.B.grad[0] / E)


def test_a_mixture_works_without_any_library():
    torch.manual_seed(0)
    router = Router(
        E, scope=TokenScope(), score=LinearScore(D, E), select=SelectTopK(K), weight=SelectedSoftmaxWeight()
    )
    mixture = Mixture(router, make("lora"))
    x = torch.randn(2, 4, D)
    y = mixture(x, RoutingContext())
    assert y.shape == (2, 4, O)
    y.sum().backward()
    assert router.scorer.weight.grad.abs().sum() > 0
