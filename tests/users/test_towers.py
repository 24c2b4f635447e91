"""Adapters on every linear of models with several towers: each part decides about its own tokens.

A row gives in a batch what it gives alone, without padding; plain LoRA is the control.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_kit import RoutedAdapterConfig, RoutingError, record_routing, routing_inputs, routing_metrics
from moe_kit.routing.state import require_routing_state
from tests.users import towers
from tests.users.test_two_passes import wake

BUILDERS = (towers.llava, towers.qwen2vl, towers.gemma3, towers.clip, towers.deberta, towers.blip2)
KINDS = {
    "lora": LoraConfig(r=3, target_modules="all-linear", exclude_modules=r".*patch_embed.*"),
    "token": {},
    "sequence": dict(scope="sequence"),
    "request": dict(scope="request"),
}


def wrap(base, kind):
    if isinstance(kind, dict):
        values = dict(num_experts=4, top_k=2, r=3, target_modules="all-linear", exclude_modules=r".*patch_embed.*")
        kind = RoutedAdapterConfig.from_preset("mixture_of_lora", **{**values, **kind})
    return wake(get_peft_model(base, copy.deepcopy(kind))).eval()


def result(output):
    return next(output[name] for name in ("logits", "text_embeds") if output.get(name) is not None)


def row_of(batch, row, length):
    """One row of a batch, without its padding."""
    alone = {}
    for name, value in batch.items():
        if name == "pixel_values" and value.dim() == 2:
            share = value.shape[0] // 2
            alone[name] = value[row * share : (row + 1) * share]
        elif value.dim() == 2 and value.shape == batch["input_ids"].shape:
            alone[name] = value[row : row + 1, :length]
        else:
            alone[name] = value[row : row + 1]
    return alone


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(build, kind):
    base, batch = build()
    expected = result(base(**batch))
    config = kind if isinstance(kind, LoraConfig) else {**kind}
    model = wrap(base, config)
    together = result(model(**batch))
    assert not torch.allclose(together, expected, atol=1e-2), "the adapters do something"
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = result(model(**row_of(batch, row, length)))[0]
        found = together[row, :length] if together.dim() == 3 else together[row]
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("scope", ["token", "sequence"])
@torch.no_grad()
def test_equal_counts_in_two_towers_are_not_mixed_up(scope):
    """Text of as many tokens as the image has patches, padded: the image has no padding."""
    base, batch = towers.clip(lengths=(10, 7))
    model = wrap(base, dict(scope=scope))
    image = model(**batch).image_embeds
    without = model(**{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}).image_embeds
    torch.testing.assert_close(image, without)
    contexts = {call.path: call.context for call in require_routing_state(model).current.calls}
    assert contexts["vision_model"].mask_BS is None
    assert contexts["text_model"].mask_BS.all(), "the mask of the last pass"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_sound(kind):
    """The first row, which has no padding, gives the same alone; the mask is about frames, of which a token is several."""
    for build in (towers.whisper, lambda: towers.whisper(frames=160, real=90), towers.wav2vec2):
        base, batch = build()
        model = wrap(base, kind if isinstance(kind, LoraConfig) else {**kind})
        with torch.no_grad():
            together = model(**batch).logits[0]
            alone = model(**{name: value[:1] for name, value in batch.items()}).logits[0]
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_loads_leave_out_the_padding_of_frames():
    base, batch = towers.wav2vec2()
    model = wrap(base, {}).train()
    model.base_model.model.config.apply_spec_augment = False
    model(**batch)
    state = require_routing_state(model)
    lengths = base._get_feat_extract_output_lengths(batch["attention_mask"].sum(1))
    counted = {int(routing.mask_N.sum()) for site, routing, _ in state.context.registered if "encoder.layers" in site}
    assert counted == {int(lengths.sum())}


def test_positions_are_no_tokens():
    """DeBERTa projects its table of relative positions with the layers that project its tokens."""
    base, batch = towers.deberta()
    model = wrap(base, dict(losses={"switch": 1.0})).train()
    with record_routing(model) as record:
        model(**batch, labels=torch.tensor([0, 2])).loss.backward()
    state = require_routing_state(model)
    sizes = {routing.num_decisions for site, routing, _ in state.context.registered if "query_proj" in site}
    assert sizes == {batch["input_ids"].numel()}
    assert record
    assert routing_metrics(model)


def test_values_of_rows_mean_rows_of_the_text():
    base, batch = towers.llava()
    model = get_peft_model(
        base,
        RoutedAdapterConfig.from_preset("poly", num_experts=3, r=2, num_tasks=2, target_modules="all-linear"),
    ).eval()
    wake(model)
    with torch.no_grad():
        with routing_inputs(model, task_ids=[1, 1]):
            model(**batch)
        with routing_inputs(model, task_ids=[0, 1]), pytest.raises(RoutingError, match="leave the tower out"):
            model(**batch)


def test_flat_tokens_of_several_images_need_their_sizes():
    base, batch = towers.qwen2vl()
    model = wrap(base, dict(scope="sequence"))
    with torch.no_grad():
        model(**batch)
        # a tower of another kind, which does not say how its tokens are split
        context = require_routing_state(model).context.derive(shape_BS=None, mask_BS=None, rows_known=False)
        x = torch.randn(7, 16)
        with pytest.raises(RoutingError, match="nothing tells which token"):
            base.model.visual.blocks[0].mlp.fc1.routing("default", x, context.fitting(x))


def test_a_router_for_the_model_keeps_towers_apart():
    base, batch = towers.llava()
    model = wrap(base, dict(router_sharing="model"))
    with record_routing(model) as record, torch.no_grad():
        model(**batch)
    assert len({site.split(".")[1] for site in record}) == 3, "text, vision and what lies between"


@pytest.mark.parametrize("build", [towers.encoder_decoder, towers.t5_encoder, towers.clip_classifier, towers.blip2])
def test_parts_of_the_text_know_their_rows(build):
    """Models inside the decoder or the encoder, and the only part of a model, see the rows of the batch."""
    base, batch = build()
    options = dict(
        num_experts=3, r=2, num_tasks=2, target_modules=["query", "key", "value", "q", "v", "q_proj", "k_proj"]
    )
    excluded = r".*(vision_model|qformer).*" if build is towers.blip2 else None
    config = RoutedAdapterConfig.from_preset("poly", **options, exclude_modules=excluded)
    model = wake(get_peft_model(base, config)).eval()
    with torch.no_grad(), routing_inputs(model, task_ids=[0, 1]):
        model(**batch)


@torch.no_grad()
def test_two_models_of_the_same_names_keep_their_tokens():
    base, batch = towers.encoder_decoder()
    model = wrap(base, dict(scope="sequence"))
    model(**batch)
    current = require_routing_state(model).current
    masks = {
        name: current.seen(layer.place).mask_BS.sum(1).tolist()
        for name, layer in base.named_modules()
        if name.endswith(("attention.self.query", "attention.self.key")) and "layer.0." in name
    }
    assert masks == {
        "encoder.encoder.layer.0.attention.self.query": [5, 3],
        "encoder.encoder.layer.0.attention.self.key": [5, 3],
        "decoder.bert.encoder.layer.0.attention.self.query": [8, 4],
        "decoder.bert.encoder.layer.0.attention.self.key": [8, 4],
        "decoder.bert.encoder.layer.0.crossattention.self.query": [8, 4],
        "decoder.bert.encoder.layer.0.crossattention.self.key": [5, 3],
    }


@pytest.mark.parametrize("build", [towers.encoder_decoder, towers.blip2], ids=["pair", "blip2"])
@torch.no_grad()
def test_answers_take_no_part_in_a_decision_about_the_prompt(build):
    base, batch = build()
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :6] = -100
    model = wrap(base, dict(scope="sequence", target_modules=["query", "q_proj"], exclude_modules=None))
    changed = {name: value.clone() for name, value in batch.items()}
    changed["labels"][:, -1:] = 33
    if "pixel_values" in batch:
        changed["input_ids"][0, -1] = 33
    with record_routing(model) as before:
        model(**batch)
    first = {site: ids.clone() for site, ids in before.items()}
    with record_routing(model) as after:
        model(**changed)
    # the first row, whose answer changed and whose prompt did not
    assert all(torch.equal(after[site][0], ids[0]) for site, ids in first.items())


def test_rows_of_images_are_not_guessed():
    base, batch = towers.llava()
    model = wrap(base, dict(scope="token"))
    model.add_adapter("b", copy.deepcopy(model.peft_config["default"]))
    with torch.no_grad(), pytest.raises(RoutingError, match="may belong to any row"):
        model(**batch, adapter_names=["default", "b"])
