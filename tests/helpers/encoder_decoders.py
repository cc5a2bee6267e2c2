"""Tiny random encoder-decoders with processors: Whisper, Moonshine, Pix2Struct and Florence-2."""

from types import SimpleNamespace

import torch
import transformers as hf

from helpers import vlms
from helpers.look import sharpened, tokenizer, wide_image

SOUND = torch.sin(torch.arange(2560) / 9.0).numpy()


def moonshine():
    config = hf.MoonshineConfig(
        vocab_size=32, hidden_size=16, intermediate_size=20, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_position_embeddings=64,
    )  # fmt: skip
    processor = hf.Wav2Vec2Processor(
        feature_extractor=hf.Wav2Vec2FeatureExtractor(sampling_rate=16000, return_attention_mask=True),
        tokenizer=tokenizer(),
    )
    return hf.MoonshineForConditionalGeneration(config), processor, {"audio": SOUND, "text": ""}


def whisper():
    model, _ = vlms.whisper()
    extractor = hf.WhisperFeatureExtractor(feature_size=5, sampling_rate=16000, chunk_length=0.16, hop_length=160)
    # A number of samples that is no int cannot be padded to.
    extractor.n_samples = 2560
    return model, SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer()), {"audio": SOUND, "text": ""}


def pix2struct():
    config = hf.Pix2StructConfig(
        text_config={
            "vocab_size": 32, "hidden_size": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2,
            "decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16, "patch_embed_hidden_size": 48, "d_ff": 20, "d_kv": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "seq_len": 64,
        },
    )  # fmt: skip
    pictures = hf.Pix2StructImageProcessorPil(patch_size={"height": 4, "width": 4}, max_patches=24, is_vqa=False)
    processor = SimpleNamespace(image_processor=pictures, tokenizer=tokenizer())
    return hf.Pix2StructForConditionalGeneration(config), processor, {"image": wide_image(), "text": "a cat"}


def florence2():
    model, _ = vlms.florence2()
    pictures = hf.CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
    pictures.image_seq_length = 5
    processor = hf.Florence2Processor(image_processor=pictures, tokenizer=tokenizer(), num_additional_image_tokens=0)
    model.config.image_token_id = processor.image_token_id
    model.model.config.image_token_id = processor.image_token_id
    return model, processor, {"image": wide_image(), "text": "what is on the mat ?"}


BUILDERS = {"moonshine": moonshine, "whisper": whisper, "pix2struct": pix2struct, "florence2": florence2}


def build(name):
    """Returns a model with clearly nonuniform attention, its processor and the inputs of ``look``."""
    torch.manual_seed(0)
    model, processor, inputs = BUILDERS[name]()
    return sharpened(model), processor, inputs
