"""A tiny random LLaVA and a tiny Llama, as folders with the files of a published model."""

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.vlms import TEXT, VISION

EVIL = "</script><script>alert(1)</script>"
WORDS = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    *["what", "is", "on", "the", "mat", "?", "a", "cat", "dog", "sits", "yes", "no", "USER", "ASSISTANT", ":"],
    EVIL,
)
IMAGE = 4
QUESTION = "what is on the mat ?"
CHAT = (
    "{% for message in messages %}USER : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def tokenizer():
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def build_processor(size=12, patch=4, chat_template=None):
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return hf.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer(), patch_size=patch, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=chat_template,
    )  # fmt: skip


def build_llava(size=12, patch=4, seed=0):
    """Returns a model with clearly nonuniform attention, which default initialization would not give."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**{**VISION, "image_size": size, "patch_size": patch}),
        text_config=hf.LlamaConfig(**{**TEXT, "vocab_size": len(WORDS), "num_hidden_layers": 3}),
        image_token_id=IMAGE, vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return sharpened(hf.LlavaForConditionalGeneration(config))


def build_llama(seed=0):
    torch.manual_seed(seed)
    return sharpened(hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "vocab_size": len(WORDS)})))


def sharpened(model):
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return model.eval()


def saved_llava(folder, **options):
    build_llava().save_pretrained(folder)
    build_processor(**options).save_pretrained(folder)
    return folder


def wide_image(width=26, height=18):
    """Returns an image that is wider than high, so that it is center-cropped."""
    rows, columns = np.indices((height, width))
    return Image.fromarray(np.stack([9 * columns, 13 * rows, 7 * (rows + columns)], axis=-1).astype("uint8"))
