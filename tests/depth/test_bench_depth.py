"""The layer routers' benchmark itself: a trial of the comparison on the tiny model, and what its bars are made of."""

import itertools
import json
import shutil

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import depth as bench
from bench import depth_compare
from bench.depth_compare import Comparison, compare, front_of, plot, read_rows
from moe_kit import CheckpointError, LayerRoutingConfig
from moe_kit.depth import layer_applications
from tests.depth.families import padded_batch, tiny
from tests.depth.test_peft import randomize

TRIAL = dict(model="tiny", steps=2, base_steps=2, questions=4, simulations=2)
METHODS = ("dense", "importance", "dr_llm")
SPEED = depth_compare._speed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished trial."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth_compare, "CALIBRATED", 1)
        patch.setattr(depth_compare, "_speed", lambda work: SPEED(work, prompts=1, rounds=1))
        compare(Comparison(folder=folder, methods=METHODS, **TRIAL))
    return folder


def test_every_point_has_its_row(folder):
    rows = read_rows(folder / "rows.jsonl")
    points = [(row["method"], row["saved"]) for row in rows]
    assert points == [(method, saved) for method in METHODS for saved in depth_compare.SAVED[method]]
    for row in rows:
        assert {"budget", "trained_s", "prefill_tokens_s", "decode_speed_up", "tasks"} <= set(row)
        assert row["steps"] == TRIAL["steps"]
        assert row["nats_per_token"] > 0
        assert 0 <= row["exact"] <= 1
    assert rows[0]["layers"] == rows[0]["num_layers"]
    # static routers save exactly what was asked, in whole layers
    for row in rows:
        if row["method"] == "importance":
            assert row["num_layers"] - row["layers"] == round(row["saved"] * row["num_layers"])
            assert row["budget"] == pytest.approx(row["saved"] * row["num_layers"] / (row["num_layers"] - 1))
    assert plot(folder).stat().st_size > 1000


def test_a_finished_comparison_computes_nothing_and_a_lost_row_alone_is_made_again(folder, monkeypatch):
    path = folder / "rows.jsonl"
    before = path.read_text()
    computed = []
    points = depth_compare._points

    def watched(method, seed, shares, settings):
        computed.append((method, list(shares)))
        return points(method, seed, shares, settings)

    monkeypatch.setattr(depth_compare, "_points", watched)
    compare(Comparison(folder=folder, methods=METHODS, **TRIAL))
    assert path.read_text() == before
    assert not computed
    # a row cut short by a kill
    lines = before.splitlines(keepends=True)
    lost = json.loads(lines[2])
    path.write_text("".join(lines[:2]) + lines[2][:20])
    compare(Comparison(folder=folder, methods=("importance",), **TRIAL))
    again = read_rows(path)
    assert computed == [("importance", [lost["saved"]])]
    for name in ("method", "saved", "budget", "layers", "nats_per_token", "exact"):
        assert again[2][name] == lost[name]
    path.write_text(before)


@pytest.mark.parametrize("other", [dict(steps=3), dict(model="smollm2-135m-instruct"), dict(questions=9)])
def test_a_folder_takes_no_points_of_other_settings(folder, other):
    before = (folder / "rows.jsonl").read_text()
    with pytest.raises(CheckpointError, match=f"holds a comparison with .*{next(iter(other))}"):
        compare(Comparison(folder=folder, methods=METHODS, **{**TRIAL, **other}))
    assert (folder / "rows.jsonl").read_text() == before


def test_speeds_of_merged_lora_do_not_join_those_of_lora_beside_the_base(folder, tmp_path):
    shutil.copy(folder / "rows.jsonl", tmp_path)
    settings = json.loads((folder / "settings.json").read_text())
    del settings["lora"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="'lora': 'beside the base'"):
        compare(Comparison(folder=tmp_path, methods=METHODS, **TRIAL))


def test_rows_without_settings_still_tell_their_steps(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(method="dense", seed=0, saved=None, steps=40)) + "\n")
    with pytest.raises(CheckpointError, match="'steps': 40"):
        compare(Comparison(folder=tmp_path, methods=("dense",), **TRIAL))


def test_the_front_is_what_nothing_beats():
    assert front_of([(1, 1.0), (1, 0.5), (2, 0.5), (3, 0.1)]) == [(1, 0.5), (3, 0.1)]
    assert front_of([]) == []


@pytest.fixture
def small(monkeypatch):
    """The benchmark's model with narrow layers."""

    def base_model(layers=None):
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
        config = LlamaConfig(vocab_size=49152, num_hidden_layers=layers or 9, tie_word_embeddings=True, **sizes)
        return AutoModelForCausalLM.from_config(config).eval()

    monkeypatch.setattr(bench, "base_model", base_model)
    monkeypatch.setattr(bench, "PREFILL", 32)
    monkeypatch.setattr(bench, "DECODE", 2)


def test_the_plain_side_has_no_router_and_the_routed_one_its_parameters(small):
    plain, routed = bench.plain_and_routed()
    assert not any("depth_unit" in name for name, _ in plain.named_modules())
    own = {id(parameter) for parameter in plain.parameters()}
    assert own == {id(p) for n, p in routed.named_parameters() if "moe_depth" not in n}
    assert not plain._forward_hooks


def test_a_decoding_side_does_the_same_work_every_time(small):
    _, routed = bench.plain_and_routed()
    ids = torch.randint(0, 100, (1, 32))
    side = bench.Routes(routed, [[1] + [0] * 8], ids)
    side.start()
    lengths = [layer.get_seq_length() for layer in side.cache.layers[:2]]
    assert lengths == [32, 0]
    operations = [bench.flops(side.decode) for _ in range(2)]
    assert operations[0] == operations[1] > 0
    assert [layer.get_seq_length() for layer in side.cache.layers[:2]] == lengths


def test_the_sequence_bar_counts_the_whole_saving(small, capsys):
    rows = bench.sequence_bars(1)
    assert [(row["phase"], row["batch"], row["share"]) for row in rows] == [
        (phase, batch, share) for batch in (1, 4) for phase in ("prefill", "decode") for share in (0.25, 0.5)
    ]
    assert all(0.98 <= row["flops_ratio"] <= 1.02 for row in rows)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_sides_take_turns_and_change_their_neighbours():
    order = []
    times = bench.rounds_of({name: lambda name=name: order.append(name) for name in "abc"}, 12)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    # a first one warms up
    assert rounds[0] == list("abc")
    assert all(sorted(names) == list("abc") for names in rounds)
    # every side follows every other one at some time, and none itself
    assert all(a[-1] != b[0] for a, b in itertools.pairwise(rounds[1:]))
    assert {(a, b) for names in rounds[1:] for a, b in itertools.pairwise(names)} == set(
        itertools.permutations("abc", 2)
    )
    assert all(len(values) == 12 for values in times.values())


@torch.no_grad()
def test_merged_lora_computes_the_same_and_the_routers_stay():
    model = tiny().eval()
    model.add_adapter(LayerRoutingConfig.from_preset("informed"), "depth")
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"), "lora")
    model.set_adapter(["depth", "lora"])
    randomize(model).eval()
    batch = padded_batch((12, 7))
    expected, layers = model(**batch).logits, layer_applications(model)
    assert layers.min() < 1
    depth_compare.merge_lora(model)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert not [module for module in model.modules() if isinstance(module, LoraLayer)]
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer_applications(model), layers)
