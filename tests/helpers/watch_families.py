"""Multimodal families of transformers for the tests of ``eq.watch``: tiny models, two kinds of inputs, labels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from helpers import vlms
from helpers.tiny_config import AUDIO, IMAGE, VIDEO, build, sharpened
from helpers.vlms import FAMILIES as KNOWN

FORMS = ("without padding", "with padding")
IDS, WORDS = "ids", "words"
"""Labels of a sequence by its placeholders; also for words after a prefix of another modality."""
Rules = tuple[tuple[str, Any], ...]
VISION = (r"vision|visual|image|img|navit|vpm|projector|connector|resampler|perceiver|q_?former|merger", "image")
AUDITORY = (r"audio|speech", "audio")


@dataclass(frozen=True)
class Family:
    """A model type.

    Attributes:
        kind: what it is, for the table.
        make: makes the tiny model.
        inputs: makes inputs of a form, 0 or 1.
        rules: (pattern of module names, labels of the keys): the first that matches counts. Labels are the name of a
            modality; ``IDS``; or a function of the inputs and the number of keys.
        generates: whether ``generate`` is compared as well.
    """

    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    rules: Rules = ((VISION), (AUDITORY), ("", IDS))
    generates: bool = True


FOUND: dict[str, Family] = {}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(form: int, places: int = 0, token: int = IMAGE, *, right: bool = False, extra: int = 0) -> dict[str, Tensor]:
    """Returns two samples of word ids with placeholders at 4; the second form is longer, with padding."""
    length = 9 + places + 3 * form + extra
    ids = torch.randint(100, 180, (2, length), generator=torch.Generator().manual_seed(form))
    ids[:, 4 : 4 + places] = token
    mask = torch.ones_like(ids)
    if form:
        gap = slice(length - 2, length) if right else slice(0, 2)
        ids[1, gap], mask[1, gap] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def add(name: str, kind: str, make: Any, inputs: Callable[[int], dict[str, Any]], *rules: Any, **known: Any) -> None:
    if isinstance(make, dict):
        make = partial(build, make.pop("type", name), **make)
    FOUND[name] = Family(kind, make, inputs, (*rules, *Family.rules), **known)


TYPED = ("qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "qwen3_5", "qwen3_5_moe", "paddleocr_vl")


def vlm(name: str, places: int, images: dict[str, Any], make: Any = None, *rules: Any, **known: Any) -> None:
    """Returns a decoder with placeholders for images; the tensors ``images`` are the same in both forms."""

    def inputs(form: int) -> dict[str, Any]:
        given = words(form, places) | {k: v(form) if callable(v) else v for k, v in images.items()}
        if name in TYPED and "image_grid_thw" in images and "mm_token_type_ids" not in images:
            given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).long()
        return given

    add(name, "decoder, images", {} if make is None else make, inputs, *rules, **known)


PIXELS = {"pixel_values": noise(2, 3, 16, 16)}
ONE = {"pixel_values": noise(2, 1, 3, 16, 16)}
TILES = {"pixel_values": noise(2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)}
PIN = [[16, 16], [16, 32], [32, 16]]
GRID = {"pixel_values": noise(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
FLAT = {"pixel_values": noise(32, 48), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
START = {"vision_start_token_id": 193, "vision_end_token_id": 194}

vlm("llava_next_video", 36, TILES, {"image_grid_pinpoints": PIN})
vlm("llava_onevision", 36, TILES, {"image_grid_pinpoints": PIN})
vlm("vipllava", 16, PIXELS, {"vision_feature_layers": [-1, -2]})
vlm("video_llava", 16, {"pixel_values_images": noise(2, 3, 16, 16)})
vlm("aria", 4, PIXELS, {"projector_patch_to_query_dict": {16: 4}})
vlm("aya_vision", 4, PIXELS)
vlm("cohere2_vision", 4, PIXELS)
vlm("deepseek_vl", 16, PIXELS)
vlm("got_ocr2", 1, PIXELS)
vlm("idefics2", 64, {"pixel_values": noise(2, 1, 3, 16, 16)})
vlm("janus", 16, PIXELS)
vlm("ovis2", 16, PIXELS)
vlm("shieldgemma2", 4, PIXELS, {"mm_tokens_per_image": 4})
vlm("qwen3_vl_moe", 4, GRID, START)
vlm("glm4v", 4, GRID)
vlm("glm4v_moe", 4, GRID)
vlm("glm46v", 4, GRID)
vlm("glm_ocr", 4, GRID)
vlm("qwen3_5", 4, GRID, START)
vlm("qwen3_5_moe", 4, GRID, START)
vlm("qwen2_5_omni_thinker", 4, GRID, START)
vlm("qwen3_omni_moe_thinker", 4, GRID, START)
vlm("paddleocr_vl", 4, {**FLAT, "pixel_values": noise(32, 3, 4, 4)})
vlm("video_llama_3", 4, {**FLAT, "image_merge_sizes": torch.tensor([2, 2])})
vlm("lighton_ocr", 4, {**PIXELS, "image_sizes": torch.tensor([[16, 16]] * 2)})
vlm(
    "lfm2_vl",
    4,
    {
        "pixel_values": noise(2, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
    },
)
vlm("fuyu", 4, {"image_patches": None})
vlm("minicpmv4_6", 1, {"pixel_values": noise(1, 3, 4, 128), "target_sizes": torch.tensor([[4, 4]] * 2)})
vlm("granite_docling", 1, ONE | {"pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)})
vlm(
    "gemma4",
    4,
    {
        "pixel_values": noise(2, 36, 48),
        "image_position_ids": torch.cartesian_prod(*[torch.arange(6)] * 2).expand(2, -1, -1),
    },
    {
        "options": {"vision_config": {}},
        "text_config__vocab_size_per_layer_input": 200,
        "text_config__hidden_size_per_layer_input": 8,
        "text_config__num_kv_shared_layers": 0,
    },
)
vlm(
    "deepseek_vl_hybrid",
    16,
    {**PIXELS, "high_res_pixel_values": noise(2, 3, 16, 16)},
    {"high_res_vision_config__global_attn_indexes": [0, 1]},
)
vlm("colpali", 16, PIXELS, {"cls": "ColPaliForRetrieval"}, generates=False)
vlm("colqwen2", 4, {**GRID, "pixel_values": noise(2, 16, 96)}, {"cls": "ColQwen2ForRetrieval"}, generates=False)


def speech(name: str, places: int, features: dict[str, Any], make: Any = None, *rules: Any, **known: Any) -> None:
    """Returns a decoder with placeholders for audio."""
    add(
        name,
        "decoder, audio",
        {"cls": "AutoModelForMultimodalLM"} | (make or {}),
        lambda form: words(form, places, AUDIO) | features,
        *rules,
        (r"audio|speech|encoder|projector", "audio"),
        **known,
    )


MEL = {"input_features": noise(2, 80, 128), "input_features_mask": torch.ones(2, 128, dtype=torch.long)}
speech("audioflamingo3", 32, MEL, {"cls": "AudioFlamingo3ForConditionalGeneration"})
speech("glmasr", 16, MEL)
speech("granite_speech", 6, {"input_features": noise(2, 30, 160), "input_features_mask": torch.ones(2, 6).bool()})
speech("qwen3_asr", 13, {"input_features": noise(2, 80, 100), "input_features_mask": torch.ones(2, 100).long()})
speech("fun_asr_nano", 16, {"input_features": noise(2, 16, 560), "input_features_mask": torch.ones(2, 16).long()})
add(
    "voxtral_realtime",
    "decoder, audio",
    {"cls": "AutoModelForMultimodalLM"},
    lambda f: words(f, extra=3 - 3 * f) | {"input_features": noise(2, 80, 96)},
    ("language_model", None),
    ("audio", "audio"),
    generates=False,
)


def cross(name: str, source: str, given: Callable[[int], dict[str, Any]], make: Any = None, *rules: Any, **known: Any):
    """Returns an encoder-decoder whose encoder has a single modality."""
    add(
        name,
        f"{source} encoder, text decoder",
        make or {},
        given,
        *rules,
        (r"encoder_attn(?!_)|encoder_decoder_attention|enc_dec|EncDec|cross|crossattention", source),
        (r"(^|\.)decoder(\.|_)", "text"),
        (r"encoder", source),
        ("", "text"),
        **known,
    )


def decoded(form: int, right: bool = True) -> dict[str, Tensor]:
    given = words(form, right=right)
    return {"decoder_input_ids": given["input_ids"], "decoder_attention_mask": given["attention_mask"]}


def wave(form: int) -> dict[str, Tensor]:
    mask = torch.ones(2, 8000, dtype=torch.long)
    mask[1, 8000 - 2000 * form :] = 0
    return {"input_values": noise(2, 8000), "attention_mask": mask} | decoded(form)


def frames(width: int, length: int = 48):
    def given(form: int) -> dict[str, Tensor]:
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, length - 8 * form :] = 0
        return {"input_features": noise(2, length, width), "attention_mask": mask} | decoded(form)

    return given


AUTO = {"cls": "AutoModelForSpeechSeq2Seq"}
cross("moonshine", "audio", wave, AUTO | {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4})
cross("speecht5", "audio", wave, {"cls": "SpeechT5ForSpeechToText"})
cross("speech_to_text", "audio", frames(80), AUTO)
cross("seamless_m4t", "audio", frames(160), {"cls": "SeamlessM4TForSpeechToText"})
cross("seamless_m4t_v2", "audio", frames(160), {"cls": "SeamlessM4Tv2ForSpeechToText"})
cross("canary", "audio", frames(80), AUTO)
cross(
    "pix2struct",
    "image",
    lambda form: (
        {
            "flattened_patches": noise(2, 9, 770).index_fill(2, torch.tensor([0, 1]), 1.0),
            "attention_mask": torch.ones(2, 9) - form * torch.tensor([[0.0] * 9, [0.0] * 7 + [1.0] * 2]),
        }
        | decoded(form)
    ),
)


def dual(
    name: str, cls: str, other: dict[str, Any], make: Any = None, source: str = "image", *rules: Any, **known: Any
):
    """Returns a model of two separate encoders."""
    add(
        name,
        "two encoders",
        {"cls": cls} | (make or {}),
        lambda form: words(form, right=True) | other,
        *rules,
        (r"vision|visual|image|audio|backbone|mit\.", source),
        ("", "text"),
        generates=False,
        **known,
    )


dual("altclip", "AltCLIPModel", PIXELS)
dual("chinese_clip", "ChineseCLIPModel", PIXELS)
dual("clipseg", "CLIPSegModel", PIXELS)
dual("metaclip_2", "MetaClip2Model", PIXELS)
dual("siglip", "SiglipModel", PIXELS, {"text_config__projection_size": 32})
dual(
    "siglip2",
    "Siglip2Model",
    {
        "pixel_values": noise(2, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
    },
    {"text_config__projection_size": 32},
)
dual("groupvit", "GroupViTModel", PIXELS)
dual(
    "xclip",
    "XCLIPModel",
    {"pixel_values": noise(2, 8, 3, 16, 16)},
    {
        "projection_dim": 32,
        "prompt_attention_heads": 4,
        "vision_config__mit_hidden_size": 32,
        "vision_config__mit_intermediate_size": 32,
        "vision_config__mit_num_attention_heads": 4,
    },
    "image",
    (r"prompts_generator", "image"),
)
dual("owlvit", "OwlViTModel", PIXELS)
dual("owlv2", "Owlv2Model", PIXELS)
dual("tipsv2", "Tipsv2Model", PIXELS)
dual(
    "align",
    "AlignModel",
    {"pixel_values": noise(2, 3, 64, 64)},
    {"vision_config__hidden_dim": 640, "projection_dim": 640, "text_config__hidden_size": 32},
)
dual(
    "clap",
    "ClapModel",
    {"input_features": noise(2, 1, 1001, 64), "is_longer": torch.zeros(2, 1).bool()},
    {
        "audio_config__num_mel_bins": 64,
        "audio_config__hidden_size": 64,
        "audio_config__patch_embeds_hidden_size": 8,
        "audio_config__depths": [1, 1, 1, 1],
        "audio_config__num_attention_heads": [2, 2, 2, 2],
    },
    "audio",
)


def boxes(given: dict[str, Tensor], size: int = 4) -> dict[str, Tensor]:
    left = torch.randint(0, 100, (*given["input_ids"].shape, size), generator=torch.Generator().manual_seed(3))
    if size == 4:
        left[..., 2:] = left[..., :2] + 20
    return given | {"bbox": left if size == 4 else left.float()}


def after(prefix: int, name: str = "image", *, behind: bool = True):
    """Returns the labels of words and of tokens of another modality after or before them."""

    def labels(given: dict[str, Any], keys: int) -> list[str | None]:
        text = given["input_ids"].shape[1]
        other: list[str | None] = [name] * prefix
        return (
            ["text"] * text + [None] * (keys - text - prefix) + other if behind else other + ["text"] * (keys - prefix)
        )

    return labels


def merged(given: dict[str, Any], keys: int) -> list[str | None]:
    """Returns labels of the words of the decoder, followed by the sequence of the encoder."""
    source = ["image" if token == IMAGE else "text" for token in given["input_ids"][0].tolist()]
    return ["text"] * (keys - len(source)) + source


def prefixed(given: dict[str, Any], keys: int) -> list[str | None]:
    """Returns labels of an empty melody, then words, then audio."""
    text, sounds = given["input_ids"].shape[1], given["decoder_input_ids"].shape[1]
    return [None] * (keys - text - sounds) + ["text"] * text + ["audio"] * sounds


add(
    "layoutlm",
    "joint encoder",
    {"cls": "LayoutLMModel"},
    lambda f: boxes(words(f, right=True)),
    ("", "text"),
    generates=False,
)
add(
    "layoutlmv3",
    "joint encoder",
    {"cls": "LayoutLMv3Model", "input_size": 16, "coordinate_size": 5, "shape_size": 6},
    lambda f: boxes(words(f, right=True)) | PIXELS,
    ("", after(16)),
    generates=False,
)
add(
    "lilt",
    "joint encoder",
    {"cls": "LiltModel", "hidden_size": 48},
    lambda f: boxes(words(f, right=True)),
    ("", "text"),
    generates=False,
)
add(
    "bros",
    "joint encoder",
    {"cls": "BrosModel", "dim_bbox_projection": 8, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2},
    lambda f: boxes(words(f, right=True), 8),
    ("", "text"),
    generates=False,
)
add(
    "udop",
    "joint encoder, text decoder",
    {"bos_token_id": 1, "decoder_start_token_id": 1},
    lambda f: boxes(words(f, right=True)) | PIXELS | decoded(f),
    (r"decoder.*layer\.1\.", None),
    ("decoder", "text"),
    ("encoder", None),
)
add(
    "bridgetower",
    "joint encoder",
    {
        "cls": "BridgeTowerModel",
        "hidden_size": 64,
        "text_config__hidden_size": 64,
        "vision_config__hidden_size": 64,
        "num_attention_heads": 4,
    },
    lambda f: words(f, right=True) | PIXELS,
    (r"text_model", "text"),
    (r"vision_model", "image"),
    (r"cross_modal_text_layers.*\.attention", "text"),
    (r"cross_modal_text_layers.*crossattention", "image"),
    (r"cross_modal_image_layers.*\.attention", "image"),
    (r"cross_modal_image_layers.*crossattention", "text"),
    generates=False,
)
add(
    "kosmos-2.5",
    "decoder, images",
    {"latent_query_num": 4, "vision_config__patch_embed_hidden_size": 48},
    lambda f: (
        words(f)
        | {
            "flattened_patches": noise(2, 9, 50).index_fill(2, torch.tensor([0, 1]), 1.0),
            "width": torch.tensor([3, 3]),
            "height": torch.tensor([3, 3]),
            "image_embeds_position_mask": (torch.arange(9 + 3 * f) // 4 == 1).long().expand(2, -1),
        }
    ),
)
add(
    "instructblipvideo",
    "decoder, video",
    {"video_token_index": VIDEO, "num_query_tokens": 4},
    lambda f: (
        words(f, 16, VIDEO)
        | {
            "pixel_values": noise(2, 4, 3, 16, 16),
            "qformer_input_ids": words(0)["input_ids"],
            "qformer_attention_mask": words(0)["attention_mask"],
        }
    ),
    (r"qformer.*\.attention\.attention", after(4, "video", behind=False)),
    (r"qformer|vision", "video"),
)
add(
    "t5gemma2",
    "joint encoder, text decoder",
    {"encoder__mm_tokens_per_image": 4},
    lambda f: words(f, 4) | PIXELS | decoded(f),
    (r"decoder", merged),
)
add("phi4_multimodal", "decoder, images and audio", {"cls": "AutoModelForMultimodalLM"}, lambda f: words(f))
add(
    "musicgen",
    "text encoder, audio decoder",
    {"cls": "MusicgenForConditionalGeneration"},
    lambda f: words(f, right=True) | {"decoder_input_ids": torch.randint(0, 100, (8, 6 + f))},
    (r"encoder_attn", "text"),
    (r"^decoder", "audio"),
    (r"text_encoder", "text"),
    generates=False,
)
add(
    "musicgen_melody",
    "text encoder, audio decoder",
    {"cls": "MusicgenMelodyForConditionalGeneration"},
    lambda f: words(f, right=True) | {"decoder_input_ids": torch.randint(0, 100, (8, 6 + f))},
    (r"^decoder", prefixed),
    (r"text_encoder", "text"),
    generates=False,
)
for detector, cls in (("grounding-dino", "GroundingDino"), ("mm-grounding-dino", "MMGroundingDino")):
    add(
        detector,
        "detector with text",
        {"cls": f"{cls}ForObjectDetection", "num_queries": 5},
        lambda f: words(f, right=True) | {"pixel_values": noise(2, 3, 64, 64)},
        (r"text_backbone", "text"),
        (r"backbone", "image"),
        ("encoder_attn_text|fusion_layer.attn#2|text_enhancer", "text"),
        (r"fusion_layer.attn", "image"),
        (r"encoder_attn$", "image"),
        (r"decoder.layers.\d.self_attn", "image"),
        ("", None),
        generates=False,
    )
add(
    "oneformer",
    "detector with text",
    {"cls": "OneFormerModel", "is_training": False, "task_seq_len": 9},
    lambda f: {
        "pixel_values": noise(2, 3, 64, 64),
        "task_inputs": words(0)["input_ids"] + f,
    },
    (r"pixel_level|multihead_attn", "image"),
    ("", None),
    generates=False,
)
add(
    "vision-text-dual-encoder",
    "two encoders",
    lambda: _dual(),
    lambda f: words(f, right=True) | PIXELS,
    (r"vision_model", "image"),
    ("", "text"),
    generates=False,
)


def _dual() -> nn.Module:
    import transformers as hf

    vision = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=16, patch_size=4
    )
    text = hf.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return sharpened(
        hf.VisionTextDualEncoderModel(
            hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
        )
    ).eval()


def _encoder_decoder(kind: str) -> nn.Module:
    import transformers as hf

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    if kind == "trocr":
        front = hf.ViTConfig(**size, image_size=16, patch_size=4)
        back = hf.TrOCRConfig(
            vocab_size=200,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=32,
            cross_attention_hidden_size=32,
            pad_token_id=0,
        )
    else:
        front = hf.DonutSwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
        back = hf.MBartConfig(
            vocab_size=200,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=32,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=8,
            is_decoder=True,
            add_cross_attention=True,
            pad_token_id=0,
            forced_eos_token_id=None,
        )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        front, back, pad_token_id=0, decoder_start_token_id=1
    )
    return sharpened(hf.VisionEncoderDecoderModel(config)).eval()


for named, size in (("trocr", 16), ("donut", 32)):
    cross(
        named,
        "image",
        lambda f, size=size: {"pixel_values": noise(2, 3, size, size)} | decoded(f),
        partial(_encoder_decoder, named),
    )


# Families that other tests also use.


def _known(name: str) -> None:
    def inputs(form: int) -> dict[str, Any]:
        given = dict(KNOWN[name]()[1])
        if not form:
            given["attention_mask"] = torch.ones_like(given["attention_mask"])
            if "decoder_input_ids" not in given:
                given["input_ids"] = given["input_ids"].clamp(min=3)
        return given

    FOUND[name] = Family("decoder, images or audio", lambda: vlms.family(name)[0], inputs)


for name in (
    "llava",
    "internvl",
    "gemma3",
    "paligemma",
    "idefics3",
    "smolvlm",
    "qwen2_vl_first",
    "qwen2_vl",
    "qwen3_vl",
    "blip2",
    "qwen2_audio",
    "llava_next",
    "mistral3",
    "kosmos2",
    "voxtral",
):
    _known(name)

NOT_BUILT = {
    **dict.fromkeys(("gemma3n", "perception_lm", "fast_vlm", "omdet-turbo"), "needs timm"),
    **dict.fromkeys(
        (
            "chameleon",
            "emu3",
            "llama4",
            "ernie4_5_vl_moe",
            "hunyuan_vl",
            "evolla",
            "kyutai_speech_to_text",
            "csm",
            "granite4_vision",
            "nemotron_h_omni",
            "tvp",
            "clvp",
            "vibevoice_asr",
            "dia",
            "pop2piano",
            "moonshine_streaming",
        ),
        "not tried further",
    ),
}
"""Families without a case -> why."""
