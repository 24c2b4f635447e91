"""Tiny models with several towers, and batches for them: two rows, the second one shorter."""

import torch
import transformers as T

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(vocab_size=70, **SMALL)
VISION = dict(SMALL, image_size=12, patch_size=4)


def seeded(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomized(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.15)
    return model.eval()


def tokens(lengths, image=None, images=9, vocabulary=60):
    """Ids and mask [2, longest]; the image's tokens stand behind the first two."""
    ids = torch.randint(3, vocabulary - 1, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    if image is not None:
        ids[:, 2 : 2 + images] = image
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def llava(lengths=(20, 13)):
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=T.LlamaConfig(**TEXT, num_key_value_heads=1, initializer_range=0.3, pad_token_id=0),
        image_token_index=60,
        image_token_id=60,
        vision_feature_layer=-1,
        image_seq_length=9,
    )
    batch = tokens(lengths, image=60)
    return randomized(T.LlavaForConditionalGeneration(config)), {**batch, "pixel_values": seeded((2, 3, 12, 12), 2)}


def qwen2vl(lengths=(12, 9)):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = dict(depth=2, embed_dim=16, hidden_size=16, num_heads=2, patch_size=4, temporal_patch_size=2, in_chans=3)
    config = T.Qwen2VLConfig(
        text_config=dict(TEXT, num_key_value_heads=1, rope_parameters=rope, pad_token_id=0),
        vision_config=dict(vision, spatial_merge_size=2, mlp_ratio=2),
        image_token_id=65,
        video_token_id=66,
        vision_start_token_id=67,
        vision_end_token_id=68,
    )
    batch = tokens(lengths, image=65, images=4)
    return randomized(T.Qwen2VLForConditionalGeneration(config)), {
        **batch,
        "pixel_values": seeded((32, 96), 2),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (batch["input_ids"] == 65).long(),
    }


def gemma3(lengths=(14, 9)):
    text = dict(TEXT, num_key_value_heads=1, head_dim=8, sliding_window=8, pad_token_id=0)
    config = T.Gemma3Config(
        text_config=text,
        vision_config=dict(SMALL, image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=65,
        boi_token_index=66,
        eoi_token_index=67,
    )
    batch = tokens(lengths, image=65, images=4)
    return randomized(T.Gemma3ForConditionalGeneration(config)), {
        **batch,
        "pixel_values": seeded((2, 3, 16, 16), 2),
        "token_type_ids": (batch["input_ids"] == 65).long(),
    }


def clip(lengths=(14, 11)):
    """The vision tower sees 10 tokens a row: with `lengths` of 10 the counts of both towers agree."""
    text = dict(SMALL, vocab_size=61, max_position_embeddings=20, projection_dim=16, eos_token_id=2)
    config = T.CLIPConfig(text_config=text, vision_config=dict(VISION, projection_dim=16), projection_dim=16)
    batch = tokens(lengths)
    for row, length in enumerate(lengths):
        batch["input_ids"][row, length - 1] = 2
    return randomized(T.CLIPModel(config)), {**batch, "pixel_values": seeded((2, 3, 12, 12), 2)}


def whisper(frames=40, real=30):
    sides = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    config = T.WhisperConfig(
        **sides,
        vocab_size=61,
        num_mel_bins=8,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        d_model=16,
        max_source_positions=frames // 2,
        max_target_positions=30,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    mask = torch.ones(2, frames, dtype=torch.long)
    mask[1, real:] = 0
    labels = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(2))
    labels[1, 4:] = -100
    model = randomized(T.WhisperForConditionalGeneration(config))
    return model, {"input_features": seeded((2, 8, frames), 1), "attention_mask": mask, "labels": labels}


def wav2vec2():
    config = T.Wav2Vec2Config(
        **SMALL,
        vocab_size=31,
        conv_dim=(8, 8),
        conv_kernel=(4, 4),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        # the other form normalises over time, padding included
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[1, 60:] = 0
    return randomized(T.Wav2Vec2ForCTC(config)), {"input_values": seeded((2, 80), 1) * mask, "attention_mask": mask}


def deberta(lengths=(9, 6)):
    config = T.DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, max_relative_positions=8,
        share_att_key=True, norm_rel_ebd="layer_norm", max_position_embeddings=32, num_labels=3, type_vocab_size=0,
    )  # fmt: skip
    return randomized(T.DebertaV2ForSequenceClassification(config)), tokens(lengths)


def blip2(lengths=(12, 8)):
    config = T.Blip2Config(
        vision_config=dict(VISION),
        qformer_config=dict(SMALL, vocab_size=70, encoder_hidden_size=16, cross_attention_frequency=1),
        text_config=dict(
            TEXT, model_type="opt", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=40, pad_token_id=0
        ),
        num_query_tokens=4,
        image_token_index=60,
    )
    batch = tokens(lengths, image=60, images=4)
    return randomized(T.Blip2ForConditionalGeneration(config)), {**batch, "pixel_values": seeded((2, 3, 12, 12), 2)}


def encoder_decoder():
    """Two BERTs, whose layers have the same names."""
    size = dict(TEXT, pad_token_id=0, max_position_embeddings=32)
    config = T.EncoderDecoderConfig.from_encoder_decoder_configs(T.BertConfig(**size), T.BertConfig(**size))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    source, target = tokens((5, 3)), tokens((8, 4))
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    return randomized(T.EncoderDecoderModel(config)), {**source, "labels": labels}


def t5_encoder(lengths=(7, 4)):
    config = T.T5Config(vocab_size=70, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0)
    return randomized(T.T5EncoderModel(config)), tokens(lengths)


def clip_classifier():
    vision = dict(VISION, projection_dim=16)
    model = T.CLIPForImageClassification(T.CLIPConfig(vision_config=vision, num_labels=3))
    return randomized(model), {"pixel_values": seeded((2, 3, 12, 12), 2)}
