"""Which linears share a router: those that read the same tokens, and only those."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_kit import ConfigError
from moe_kit.hf.sharing import SHARING, reads_encoder, router_group

LLAMA = "model.layers.3.self_attn."


def same(one, two, sharing="input"):
    return router_group(one, sharing) == router_group(two, sharing)


@pytest.mark.parametrize(
    "names",
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj", "model.layers.3.self_attn.v_proj"),
        ("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"),
        ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.value"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.k"),
        ("decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.0.layer.1.EncDecAttention.v"),
        ("decoder.block.0.layer.2.DenseReluDense.wi_0", "decoder.block.0.layer.2.DenseReluDense.wi_1"),
        ("model.decoder.layers.0.encoder_attn.k_proj", "model.decoder.layers.0.encoder_attn.v_proj"),
    ],
)
def test_same_input(names):
    assert len({router_group(name, "input") for name in names}) == 1


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (LLAMA + "q_proj", LLAMA + "o_proj"),
        (LLAMA + "q_proj", "model.layers.4.self_attn.q_proj"),
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.down_proj"),
        ("model.layers.3.mlp.up_proj", LLAMA + "q_proj"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0.layer.1.EncDecAttention.k"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0.layer.0.SelfAttention.q"),
        ("model.decoder.layers.0.encoder_attn.q_proj", "model.decoder.layers.0.encoder_attn.k_proj"),
        ("bert.encoder.layer.0.crossattention.self.query", "bert.encoder.layer.0.crossattention.self.key"),
    ],
)
def test_other_input(one, two):
    assert not same(one, two)


def test_wider_groups():
    assert same(LLAMA + "q_proj", "model.layers.3.mlp.down_proj", "block")
    assert not same(LLAMA + "q_proj", "model.layers.4.self_attn.q_proj", "block")
    assert same(LLAMA + "q_proj", "model.layers.9.mlp.down_proj", "model")
    assert same("h.0.attn.c_attn", "h.0.mlp.c_fc", "block")


@pytest.mark.parametrize("sharing", ["block", "model"])
def test_encoder_and_decoder_never_share(sharing):
    memory = "decoder.block.0.layer.1.EncDecAttention.k"
    own = "decoder.block.0.layer.0.SelfAttention.k"
    assert not same(memory, own, sharing)
    assert not same("encoder.block.0.layer.0.SelfAttention.k", own, sharing)
    assert same(memory, "decoder.block.0.layer.1.EncDecAttention.v", sharing)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q", True),
        ("model.encoder.layers.1.fc1", True),
        ("decoder.block.0.layer.0.SelfAttention.k", False),
        ("decoder.block.0.layer.1.EncDecAttention.q", False),
        ("decoder.block.0.layer.1.EncDecAttention.o", False),
        ("decoder.block.0.layer.1.EncDecAttention.v", True),
        ("model.decoder.layers.0.encoder_attn.v_proj", True),
        ("model.decoder.layers.0.encoder_attn.out_proj", False),
        ("lm_head", False),
    ],
)
def test_who_reads_the_encoder(path, expected):
    assert reads_encoder(path) is expected


PATHS = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "self_attn", "mlp", "q_proj", "k_proj", "up_proj", "encoder"]),
    min_size=1,
)


@given(PATHS)
def test_none_is_the_path_and_wider_groups_contain_narrower(parts):
    path = ".".join(parts)
    assert router_group(path, "none") == path
    for sharing in SHARING:
        assert router_group(path, sharing) == router_group(path, sharing)


def test_unknown():
    with pytest.raises(ConfigError, match="router_sharing is 'layer'"):
        router_group(LLAMA + "q_proj", "layer")
