"""Tiny random models of Hugging Face families with inputs, created without downloads."""

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


def random_ids(places, length=13, batch=2, token=IMAGE, seed=0):
    """Returns random ids with placeholders at ``places``, the second sample left-padded by two, and the mask."""
    random = torch.Generator().manual_seed(seed)
    result = torch.randint(3, 80, (batch, length), generator=random)
    result[:, 4 : 4 + places] = token
    mask = torch.ones_like(result)
    result[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": result, "attention_mask": mask}


def random_images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llava():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), {**random_ids(4), "pixel_values": random_images(2, 3, 8, 8)}


def internvl():
    vision = hf.InternVLVisionConfig(
        **{**VISION, "image_size": [8, 8], "patch_size": [2, 2]}, use_absolute_position_embeddings=True
    )
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return hf.InternVLForConditionalGeneration(config), {**random_ids(4), "pixel_values": random_images(2, 3, 8, 8)}


def gemma3():
    text = hf.Gemma3TextConfig(**TEXT, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    config = hf.Gemma3Config(
        text_config=text, vision_config=hf.SiglipVisionConfig(**VISION), image_token_id=IMAGE, mm_tokens_per_image=4,
        boi_token_index=93, eoi_token_index=94,
    )  # fmt: skip
    inputs = {**random_ids(4), "pixel_values": random_images(2, 3, 8, 8)}
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return hf.Gemma3ForConditionalGeneration(config), inputs


def paligemma():
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT), vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=16),
        image_token_id=IMAGE, projection_dim=16, hidden_size=16,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config), {**random_ids(4), "pixel_values": random_images(2, 3, 8, 8)}


def idefics3():
    config = hf.Idefics3Config(
        vision_config=dict(VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return hf.Idefics3ForConditionalGeneration(config), {**random_ids(1), "pixel_values": random_images(2, 1, 3, 8, 8)}


def qwen2_vl(kind="Qwen2_5_VL"):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": rope}
    vision = {
        "depth": 2, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": 16, "intermediate_size": 20, "window_size": 16,
        "fullatt_block_indexes": [1], "in_channels": 3, "in_chans": 3, "mlp_ratio": 2,
    }  # fmt: skip
    vision = {**vision, "hidden_size": 16}
    result = getattr(hf, f"{kind}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=95,
        vision_end_token_id=96,
    )  # fmt: skip
    inputs = random_ids(4)
    inputs["input_ids"][:, 3] = 95
    types = (inputs["input_ids"] == IMAGE).long()
    grid = torch.tensor([[1, 4, 4]] * 2)
    inputs |= {"pixel_values": random_images(32, 96), "image_grid_thw": grid, "mm_token_type_ids": types}
    return getattr(hf, f"{kind}ForConditionalGeneration")(result), inputs


def smolvlm():
    config = hf.SmolVLMConfig(
        vision_config=dict(VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return hf.SmolVLMForConditionalGeneration(config), {**random_ids(1), "pixel_values": random_images(2, 1, 3, 8, 8)}


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
    return hf.Blip2ForConditionalGeneration(config), {**random_ids(4), "pixel_values": random_images(2, 3, 8, 8)}


def qwen2_audio():
    audio = hf.Qwen2AudioEncoderConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=20, num_mel_bins=5,
        max_source_positions=8,
    )  # fmt: skip
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=hf.Qwen2Config(**TEXT), audio_token_index=AUDIO)
    inputs = random_ids(4, token=AUDIO)
    inputs |= {
        "input_features": random_images(2, 5, 16), "feature_attention_mask": torch.ones(2, 16, dtype=torch.long)
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
    inputs = random_ids(1)
    inputs |= {
        "pixel_values": random_images(2, 1, 1, 3, 8, 8), "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
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
    words = random_ids(0, length=7)["input_ids"].clamp(min=3)
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": random_images(2, 5, 16), "decoder_input_ids": words
    }  # fmt: skip


def clip():
    text = {**TEXT, "num_key_value_heads": None}
    text = {k: v for k, v in text.items() if k not in ("num_key_value_heads", "head_dim")}
    config = hf.CLIPConfig(text_config=text, vision_config=dict(VISION), projection_dim=8)
    words = random_ids(0)
    words["input_ids"][:, -1] = 2
    return hf.CLIPModel(config), {**words, "pixel_values": random_images(2, 3, 8, 8)}


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), random_ids(0)


BERT = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def llava_next():
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8]], vision_feature_layer=-1,
    )  # fmt: skip
    inputs = random_ids(10, length=19) | {
        "pixel_values": random_images(2, 2, 3, 8, 8),
        "image_sizes": torch.tensor([[8, 8]] * 2),
    }
    return hf.LlavaNextForConditionalGeneration(config), inputs


def mistral3():
    vision = hf.PixtralVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = hf.Mistral3Config(
        vision_config=vision, text_config=hf.MistralConfig(**TEXT, sliding_window=5), image_token_index=IMAGE,
        spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    inputs = random_ids(4) | {"pixel_values": random_images(2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)}
    return hf.Mistral3ForConditionalGeneration(config), inputs


def kosmos2():
    text = {
        "vocab_size": 97, "embed_dim": 16, "layers": 2, "ffn_dim": 20, "attention_heads": 2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    config = hf.Kosmos2Config(text_config=text, vision_config=dict(VISION), latent_query_num=4)
    places = torch.zeros(2, 13, dtype=torch.long)
    places[:, 4:8] = 1
    inputs = random_ids(0) | {"pixel_values": random_images(2, 3, 8, 8), "image_embeds_position_mask": places}
    return hf.Kosmos2ForConditionalGeneration(config), inputs


def instructblip():
    config = hf.InstructBlipConfig(
        vision_config=dict(VISION), text_config=hf.LlamaConfig(**TEXT).to_dict(), num_query_tokens=4,
        qformer_config={**BERT, "encoder_hidden_size": 16, "cross_attention_frequency": 2}, image_token_index=IMAGE,
    )  # fmt: skip
    config.image_token_id = config.image_token_index = IMAGE
    question = random_ids(0, length=6)
    inputs = random_ids(4) | {"pixel_values": random_images(2, 3, 8, 8)}
    inputs |= {"qformer_input_ids": question["input_ids"], "qformer_attention_mask": question["attention_mask"]}
    return hf.InstructBlipForConditionalGeneration(config), inputs


def bart_config():
    return hf.BartConfig(
        vocab_size=97, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip


def florence2():
    vision = hf.models.florence2.configuration_florence2.Florence2VisionConfig(
        embed_dim=(8, 16), depths=(1, 1), num_heads=(2, 2), num_groups=(2, 2), patch_size=(3, 3), patch_stride=(2, 2),
        patch_padding=(1, 1), patch_prenorm=(False, True), window_size=2, projection_dim=16,
        max_position_embeddings=10,
    )  # fmt: skip
    config = hf.Florence2Config(
        text_config=bart_config().to_dict(), vision_config=vision.to_dict(), image_token_id=IMAGE,
        is_encoder_decoder=True,
    )  # fmt: skip
    inputs = random_ids(5) | {
        "pixel_values": random_images(2, 3, 8, 8),
        "decoder_input_ids": random_ids(0, length=7)["input_ids"].clamp(3),
    }
    return hf.Florence2ForConditionalGeneration(config), inputs


def voxtral():
    audio = hf.VoxtralEncoderConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_mel_bins=5,
        max_source_positions=8,
    )  # fmt: skip
    config = hf.VoxtralConfig(audio_config=audio, text_config=hf.LlamaConfig(**TEXT), audio_token_id=AUDIO)
    return hf.VoxtralForConditionalGeneration(config), {
        **random_ids(2, token=AUDIO),
        "input_features": random_images(2, 5, 16),
    }


def idefics():
    config = hf.IdeficsConfig(
        vocab_size=97, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        cross_layer_interval=1, additional_vocab_size=0, pad_token_id=0, use_resampler=True,
        vision_config={
            "embed_dim": 16, "image_size": 8, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 20,
        },
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8,
        },
    )  # fmt: skip
    sees = torch.ones(2, 13, 1, dtype=torch.long)
    inputs = random_ids(0) | {"pixel_values": random_images(2, 1, 3, 8, 8), "image_attention_mask": sees}
    return hf.IdeficsForVisionText2Text(config), inputs


def blip():
    text = {**BERT, "encoder_hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    config = hf.BlipConfig(text_config={**text, "is_decoder": True}, vision_config=dict(VISION), projection_dim=8)
    return hf.BlipForConditionalGeneration(config), {**random_ids(0), "pixel_values": random_images(2, 3, 8, 8)}


def bart():
    inputs = random_ids(0) | {"decoder_input_ids": random_ids(0, length=7)["input_ids"].clamp(3)}
    return hf.BartForConditionalGeneration(bart_config()), inputs


def t5():
    config = hf.T5Config(
        vocab_size=97, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    inputs = random_ids(0) | {"decoder_input_ids": random_ids(0, length=7)["input_ids"].clamp(3)}
    return hf.T5ForConditionalGeneration(config), inputs


def gpt_oss():
    config = hf.GptOssConfig(
        **TEXT, num_local_experts=2, num_experts_per_tok=1, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return hf.GptOssForCausalLM(config), random_ids(0)


def gemma2():
    config = hf.Gemma2Config(**TEXT, sliding_window=5, attn_logit_softcapping=2.0)
    return hf.Gemma2ForCausalLM(config), random_ids(0)


def git():
    config = hf.GitConfig(vision_config=dict(VISION), **BERT)
    return hf.GitForCausalLM(config), {**random_ids(0), "pixel_values": random_images(2, 3, 8, 8)}


def vilt():
    config = hf.ViltConfig(**BERT, image_size=8, patch_size=4, max_image_length=-1)
    words = random_ids(0)
    words["token_type_ids"] = torch.zeros_like(words["input_ids"])
    return hf.ViltModel(config), {**words, "pixel_values": random_images(2, 3, 8, 8)}


def visual_bert():
    config = hf.VisualBertConfig(**BERT, visual_embedding_dim=6)
    ones = torch.ones(2, 5, dtype=torch.long)
    inputs = random_ids(0) | {
        "visual_embeds": random_images(2, 5, 6),
        "visual_attention_mask": ones,
        "visual_token_type_ids": ones,
    }
    return hf.VisualBertModel(config), inputs


def flava():
    part = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.FlavaConfig(
        image_config={**part, "image_size": 8, "patch_size": 4}, text_config=dict(BERT), multimodal_config=part,
        hidden_size=16, projection_dim=8,
    )  # fmt: skip
    return hf.FlavaModel(config), {**random_ids(0), "pixel_values": random_images(2, 3, 8, 8)}


def lxmert():
    config = hf.LxmertConfig(
        vocab_size=97, hidden_size=16, num_attention_heads=2, intermediate_size=20, l_layers=1, x_layers=1, r_layers=1,
        visual_feat_dim=6, max_position_embeddings=64,
    )  # fmt: skip
    return hf.LxmertModel(config), {
        **random_ids(0),
        "visual_feats": random_images(2, 5, 6),
        "visual_pos": random_images(2, 5, 4).abs(),
    }


def roberta():
    return hf.RobertaModel(hf.RobertaConfig(**BERT)), random_ids(0)


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION)), {"pixel_values": random_images(2, 3, 8, 8)}


FAMILIES = {
    made.__name__: made
    for made in (
        llava, internvl, gemma3, paligemma, idefics3, smolvlm, qwen2_vl, blip2, qwen2_audio, mllama, whisper, clip,
        llama, llava_next, mistral3, kosmos2, instructblip, florence2, voxtral, idefics, blip, bart, t5, gpt_oss,
        gemma2, git, vilt, visual_bert, flava, lxmert, roberta, vit,
    )
}  # fmt: skip
FAMILIES["qwen3_vl"] = lambda: qwen2_vl("Qwen3VL")
FAMILIES["qwen2_vl_first"] = lambda: qwen2_vl("Qwen2VL")


def family(name, seed=0):
    """Returns a model with clearly nonuniform attention in evaluation mode, and its inputs."""
    torch.manual_seed(seed)
    model, inputs = FAMILIES[name]()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if weight.ndim == 2 and any(
                word in part for word in ("q_proj", "k_proj", "qkv", "query", "key", ".q.", ".k.")
            ):
                weight.mul_(8)
    return model.eval(), inputs
