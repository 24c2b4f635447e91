"""The adapter benchmark itself: every side trains what it says, and a noisy part is run again."""

import math

import pytest
import torch
from torch.nn.functional import linear

from bench import _adapter_sides as sides
from bench import adapters as bench
from tests.tiny import batch_of, tiny_llama


def base():
    model = tiny_llama(layers=1)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("name", sides.SIDES)
def test_every_side_trains_its_adapters_only(name):
    if name in sides.missing():
        pytest.skip(sides.missing()[name])
    frozen = base()
    model = sides.SIDES[name](sides.with_shared_weights(frozen))
    own = {id(p) for p in frozen.parameters()}
    assert own <= {id(p) for p in model.parameters()}
    extra = {"task_ids": torch.zeros(2, dtype=torch.long)} if "poly" in name else {}
    step = bench.Step(model, batch_of(), extra)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert not own & {id(p) for p in trained}
    before = [p.detach().clone() for p in trained]
    losses = [step.model(**step.batch, **extra).loss.item()]
    for _ in range(3):
        step()
    losses.append(step.model(**step.batch, **extra).loss.item())
    assert all(map(math.isfinite, losses))
    moved = sum(not torch.equal(p, q) for p, q in zip(trained, before, strict=True))
    assert moved > 0.7 * len(trained)
    assert bench.saved_bytes(step) > 0


def test_x_lora_mixes_eight_different_trainable_loras():
    model = sides.xlora(base())
    A = [p for name, p in model.named_parameters() if "q_proj.lora_A" in name]
    assert len(A) == 8
    assert all(p.requires_grad for p in A)
    assert not any(torch.equal(A[0], other) for other in A[1:])
    assert model.base_model.xlora_config.top_k_lora == 2


def test_mixlora_equals_the_loop_of_experts():
    """One feed-forward block with the package's weights, written out."""
    pytest.importorskip("mixlora", reason=sides.missing().get("mixlora 8x8 top-2", ""))
    torch.manual_seed(0)
    model = sides.mixlora(base(), num_experts=3, rank=2)
    mlp = model.model.layers[0].mlp
    block = mlp.mixlora_moes["default"]
    for expert in block.experts_.values():
        torch.nn.init.normal_(expert.lora_B.weight)
    x = torch.randn(1, 4, 16)
    weights, ids = linear(x[0], mlp.mixlora_gate).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)

    def project(name, h, e):
        expert = block.experts_[f"experts.{e}.{name}"]
        return getattr(mlp, name)(h) + 2 * expert.lora_B(expert.lora_A(h))

    expected = torch.zeros(4, 16)
    for token in range(4):
        for slot in range(2):
            e = int(ids[token, slot])
            h = mlp.act_fn(project("gate_proj", x[0, token], e)) * project("up_proj", x[0, token], e)
            expected[token] += weights[token, slot] * project("down_proj", h, e)
    torch.testing.assert_close(mlp(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("noises", "attempts", "says"), [([0.03], 1, None), ([0.031, 0.01], 2, "once more"), ([0.2, 0.1], 2, "neither")]
)
def test_a_part_with_a_noisy_guard_is_repeated_once(monkeypatch, capsys, noises, attempts, says):
    left = list(noises)

    def part(model, rounds, layers):
        noise = left.pop(0)
        return [{"side": side, "noise": noise, "rounds": rounds, "layers": layers} for side in ("a", "b")]

    monkeypatch.setitem(bench.BENCHES, "step", part)
    rows = bench.run_guarded("step", base(), 3, 1)
    assert [row["attempt"] for row in rows] == [n for n in range(1, attempts + 1) for _ in "ab"]
    assert [row["noise"] for row in rows[::2]] == noises
    out = capsys.readouterr().out
    assert not out if says is None else says in out
