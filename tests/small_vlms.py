"""Tiny random models of Hugging Face families, with inputs; made in the test, nothing is loaded."""

import torch
import transformers as hf

TEXT = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
IMAGE, VIDEO, AUDIO = 90, 91, 92


def ids(places, length=13, batch=2, token=IMAGE, seed=0):
    """Random words with ``places`` of placeholders, the second sample padded by two on the left, and its mask."""
    random = torch.Generator().manual_seed(seed)
    found = torch.randint(3, 80, (batch, length), generator=random)
    found[:, 4 : 4 + places] = token
    mask = torch.ones_like(found)
    found[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": found, "attention_mask": mask}


def pictures(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llava():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), {**ids(4), "pixel_values": pictures(2, 3, 8, 8)}


def internvl():
    vision = hf.InternVLVisionConfig(
        **{**VISION, "image_size": [8, 8], "patch_size": [2, 2]}, use_absolute_position_embeddings=True
    )
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return hf.InternVLForConditionalGeneration(config), {**ids(4), "pixel_values": pictures(2, 3, 8, 8)}


def gemma3():
    text = hf.Gemma3TextConfig(**TEXT, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    config = hf.Gemma3Config(
        text_config=text, vision_config=hf.SiglipVisionConfig(**VISION), image_token_id=IMAGE, mm_tokens_per_image=4,
        boi_token_index=93, eoi_token_index=94,
    )  # fmt: skip
    inputs = {**ids(4), "pixel_values": pictures(2, 3, 8, 8)}
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return hf.Gemma3ForConditionalGeneration(config), inputs


def paligemma():
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT), vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=16),
        image_token_id=IMAGE, projection_dim=16, hidden_size=16,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config), {**ids(4), "pixel_values": pictures(2, 3, 8, 8)}


def idefics3():
    config = hf.Idefics3Config(
        vision_config=dict(VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return hf.Idefics3ForConditionalGeneration(config), {**ids(1), "pixel_values": pictures(2, 1, 3, 8, 8)}


def qwen2_vl(kind="Qwen2_5_VL"):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": rope}
    vision = {
        "depth": 2, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": 16, "intermediate_size": 20, "window_size": 16,
        "fullatt_block_indexes": [1], "in_channels": 3, "in_chans": 3, "mlp_ratio": 2,
    }  # fmt: skip
    vision = {**vision, "hidden_size": 16}
    made = getattr(hf, f"{kind}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=95,
        vision_end_token_id=96,
    )  # fmt: skip
    inputs = ids(4)
    inputs["input_ids"][:, 3] = 95
    types = (inputs["input_ids"] == IMAGE).long()
    grid = torch.tensor([[1, 4, 4]] * 2)
    inputs |= {"pixel_values": pictures(32, 96), "image_grid_thw": grid, "mm_token_type_ids": types}
    return getattr(hf, f"{kind}ForConditionalGeneration")(made), inputs


def smolvlm():
    config = hf.SmolVLMConfig(
        vision_config=dict(VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return hf.SmolVLMForConditionalGeneration(config), {**ids(1), "pixel_values": pictures(2, 1, 3, 8, 8)}


def blip2():
    config = hf.Blip2Config(
        vision_config=dict(VISION), text_config=hf.OPTConfig(
            vocab_size=97, hidden_size=16, ffn_dim=20, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0,
        ).to_dict(),
        qformer_config={
            "vocab_size": 97, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 2, "encoder_hidden_size": 16, "cross_attention_frequency": 2,
        },
        num_query_tokens=4, image_token_id=IMAGE, image_text_hidden_size=16,
    )  # fmt: skip
    config.image_token_id = config.image_token_index = IMAGE
    return hf.Blip2ForConditionalGeneration(config), {**ids(4), "pixel_values": pictures(2, 3, 8, 8)}


def qwen2_audio():
    audio = hf.Qwen2AudioEncoderConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=20, num_mel_bins=5,
        max_source_positions=8,
    )  # fmt: skip
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=hf.Qwen2Config(**TEXT), audio_token_index=AUDIO)
    inputs = ids(4, token=AUDIO)
    inputs |= {
        "input_features": pictures(2, 5, 16), "feature_attention_mask": torch.ones(2, 16, dtype=torch.long)
    }  # fmt: skip
    return hf.Qwen2AudioForConditionalGeneration(config), inputs


def mllama():
    text = hf.models.mllama.configuration_mllama.MllamaTextConfig(
        **{k: v for k, v in TEXT.items() if k != "head_dim"}, cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    vision = hf.models.mllama.configuration_mllama.MllamaVisionConfig(
        hidden_size=16, attention_heads=2, num_hidden_layers=2, num_global_layers=1, intermediate_size=20,
        vision_output_dim=32, image_size=8, patch_size=4, max_num_tiles=1, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    inputs = ids(1)
    inputs |= {
        "pixel_values": pictures(2, 1, 1, 3, 8, 8), "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 13, 1, 1, dtype=torch.long),
    }  # fmt: skip
    return hf.MllamaForConditionalGeneration(config), inputs


def whisper():
    config = hf.WhisperConfig(
        vocab_size=97, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, num_mel_bins=5, max_source_positions=8,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    words = ids(0, length=7)["input_ids"].clamp(min=3)
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": pictures(2, 5, 16), "decoder_input_ids": words
    }  # fmt: skip


def clip():
    text = {**TEXT, "num_key_value_heads": None}
    text = {k: v for k, v in text.items() if k not in ("num_key_value_heads", "head_dim")}
    config = hf.CLIPConfig(text_config=text, vision_config=dict(VISION), projection_dim=8)
    words = ids(0)
    words["input_ids"][:, -1] = 2
    return hf.CLIPModel(config), {**words, "pixel_values": pictures(2, 3, 8, 8)}


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), ids(0)


FAMILIES = {
    made.__name__: made
    for made in (
        llava, internvl, gemma3, paligemma, idefics3, smolvlm, qwen2_vl, blip2, qwen2_audio, mllama, whisper, clip,
        llama,
    )
}  # fmt: skip
FAMILIES["qwen3_vl"] = lambda: qwen2_vl("Qwen3VL")
FAMILIES["qwen2_vl_first"] = lambda: qwen2_vl("Qwen2VL")


def family(name, seed=0):
    torch.manual_seed(seed)
    model, inputs = FAMILIES[name]()
    return model.eval(), inputs
