"""Tiny random models whose processors split an image into tiles; the layers of their vision towers change nothing."""

import re

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.look import WORDS
from helpers.vlms import TEXT, VISION

SIDE, PATCH = 32, 4
SPECIAL = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>", "<img>", "</img>",
    "<boi>", "<eoi>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE", "TILE_GLOBAL",
)  # fmt: skip
VOCABULARY = [word for word in WORDS if word not in SPECIAL] + ["\n"]
TINY = {**TEXT, "vocab_size": len(VOCABULARY) + len(SPECIAL), "max_position_embeddings": 4096}
EYE = {**VISION, "image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": 1}


def tokenizer(**named):
    """Returns a tokenizer of words that knows the special tokens of all families; ``named`` are its attributes."""
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=named,
    )  # fmt: skip
    words.add_special_tokens({"additional_special_tokens": list(SPECIAL)}, replace_extra_special_tokens=False)
    return words


def made(kind, **parts):
    """Returns a processor, without its video processor, which requires torchvision."""

    class WithoutVideo(kind):
        def check_argument_for_proper_class(self, *_):
            """Skips the check, which the missing video processor would fail."""

    WithoutVideo.__name__ = kind.__name__
    return WithoutVideo(**parts)


def llava_next(name="llava_next"):
    pins = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
    size = {"height": SIDE, "width": SIDE}
    words = tokenizer(image_token="<image>")
    text = hf.LlamaConfig(**TINY)
    if name == "llava_next":
        pictures = hf.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=pins)
        config = hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**EYE), text_config=text, image_token_id=words.image_token_id,
            image_grid_pinpoints=pins, vision_feature_layer=-1,
        )  # fmt: skip
        processor = hf.LlavaNextProcessor(
            image_processor=pictures, tokenizer=words, patch_size=PATCH, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
        return hf.LlavaNextForConditionalGeneration(config), processor
    pictures = hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pins)
    ratio = "anyres_max_9" if name == "llava_onevision" else "anyres_max_2"
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**EYE, vision_use_head=False), text_config=text,
        image_token_id=words.image_token_id, image_grid_pinpoints=pins, vision_feature_layer=-1,
        vision_aspect_ratio=ratio,
    )  # fmt: skip
    processor = made(
        hf.LlavaOnevisionProcessor, image_processor=pictures, tokenizer=words, num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full", vision_aspect_ratio=ratio,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def internvl():
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<image>", video_token="<video>"
    )
    vision = hf.InternVLVisionConfig(
        **{**EYE, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}, use_absolute_position_embeddings=True
    )
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TINY), image_token_id=words.context_image_token_id,
        downsample_ratio=0.5,
    )  # fmt: skip
    pictures = hf.GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    processor = made(hf.InternVLProcessor, image_processor=pictures, tokenizer=words, image_seq_length=16)
    return hf.InternVLForConditionalGeneration(config), processor


def idefics3():
    words = tokenizer(
        image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>"
    )
    config = hf.Idefics3Config(
        vision_config=dict(EYE), text_config=hf.LlamaConfig(**TINY), scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pictures = hf.Idefics3ImageProcessor(size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = hf.Idefics3Processor(image_processor=pictures, tokenizer=words, image_seq_len=16)
    return hf.Idefics3ForConditionalGeneration(config), processor


def gemma3():
    words = tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    text = hf.Gemma3TextConfig(**{**TINY, "num_hidden_layers": 1}, sliding_window=5, layer_types=["full_attention"])
    config = hf.Gemma3Config(
        text_config=text, vision_config=hf.SiglipVisionConfig(**EYE, vision_use_head=False), mm_tokens_per_image=16,
        image_token_id=words.image_token_id, boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id,
    )  # fmt: skip
    pictures = hf.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})

    processor = hf.Gemma3Processor(image_processor=pictures, tokenizer=words, image_seq_length=16)
    # The defaults of the processor take precedence over the options of its image processor.
    processor.images_kwargs = processor.images_kwargs | {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}
    return hf.Gemma3ForConditionalGeneration(config), processor


def aya_vision():
    words = tokenizer(image_token="<image>")
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**EYE, vision_use_head=False), text_config=hf.Cohere2Config(**TINY),
        downsample_factor=2, image_token_id=words.convert_tokens_to_ids("<|IMG_PATCH|>"), vision_feature_layer=-1,
    )  # fmt: skip
    pictures = hf.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=6)
    processor = hf.AyaVisionProcessor(
        image_processor=pictures, tokenizer=words, patch_size=2 * PATCH, img_size=SIDE, image_token="<image>"
    )
    return hf.AyaVisionForConditionalGeneration(config), processor


FAMILIES = {
    "llava_next": llava_next, "llava_onevision": lambda: llava_next("llava_onevision"),
    "llava_onevision_interpolated": lambda: llava_next("interpolated"), "internvl": internvl, "idefics3": idefics3,
    "gemma3": gemma3, "aya_vision": aya_vision,
}  # fmt: skip


def build(name):
    """Returns a model and its processor."""
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.any():
                weight.normal_()
            if "vision" in name and re.search(
                r"layers?\.\d+\..*(out_proj|o_proj|fc2|projection_layer)\.(weight|bias)$", name
            ):
                weight.zero_()
    return model.eval(), processor


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def image_embeddings(model, inputs, labels):
    """Returns the embeddings that enter the language model at the image tokens."""
    kept = []
    text = model.get_decoder()
    handle = text.register_forward_pre_hook(
        lambda module, args, options: kept.append(options["inputs_embeds"][0]), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return kept[0][labels]
