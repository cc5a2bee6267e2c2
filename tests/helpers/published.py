"""Tiny random CLIP, SigLIP and BLIP-2 with processors, as folders with the files of a published model."""

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from helpers.vlms import VISION

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "red", "heart", "face", "cat", "blue", "book", "woman", "man", "skin", "tone")
PICTURE = {**VISION, "image_size": 16, "patch_size": 8}
TEXT = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tokenizer():
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.normalizer = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=32,
    )  # fmt: skip


def image_processor():
    return hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def clip(seed=0):
    torch.manual_seed(seed)
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=PICTURE, projection_dim=12)).eval()


def siglip(seed=0):
    torch.manual_seed(seed)
    text = {**TEXT, "projection_size": 16}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=PICTURE)).eval()


def blip2(seed=0):
    torch.manual_seed(seed)
    config = hf.Blip2Config(
        vision_config=PICTURE, num_query_tokens=3, image_text_hidden_size=12,
        qformer_config={
            "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 2, "encoder_hidden_size": 16, "cross_attention_frequency": 1,
            "use_qformer_text_input": True, "pad_token_id": 0,
        },
    )  # fmt: skip
    return hf.Blip2ForImageTextRetrieval(config).eval()


def saved_clip(folder):
    clip().save_pretrained(folder)
    hf.CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer()).save_pretrained(folder)
    return folder


class Processor:
    """A processor with its two parts."""

    def __init__(self):
        self.image_processor, self.tokenizer = image_processor(), tokenizer()
