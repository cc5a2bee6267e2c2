"""A tiny random LLaVA with the vocabulary of the scenes."""

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from equipoise.data.sets.text_codes import WORDS
from equipoise.evaluation import GenerativeVLM
from equipoise.evaluation.pointing import ROWS
from helpers import look as small_look


def build_vlm(seed=0):
    """A tiny LLaVA whose tokens are the words of the scenes."""
    known = dict.fromkeys((*WORDS, "<unk>", "?", ".", "answer", "with", "word", "USER", ":"))
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    text = {**small_look.TEXT, "vocab_size": len(known), "num_hidden_layers": 3}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**{**small_look.VISION, "image_size": 4 * ROWS, "patch_size": 4}),
        text_config=hf.LlamaConfig(**text), image_token_id=WORDS.index("<image>"),
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = small_look.sharpened(hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager"))
    pictures = hf.CLIPImageProcessorPil(
        size={"shortest_edge": 4 * ROWS}, crop_size={"height": 4 * ROWS, "width": 4 * ROWS}
    )
    processor = hf.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=4, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return GenerativeVLM(model, processor)
