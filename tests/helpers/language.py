"""Small vision-language models on a few scenes."""

from functools import lru_cache

import torch

from equipoise.data.sets.scenes import Scenes
from equipoise.encoders import PatchEncoder
from equipoise.models.vision_language import VisionLanguageModel


@lru_cache(maxsize=1)
def small_scenes():
    return Scenes(samples=128)


def build_vlm(connector="mlp", seed=0, **options):
    """Returns a model of width 20 with an encoder of width 12, two blocks and five latents."""
    torch.manual_seed(seed)
    encoder = PatchEncoder(3, (48, 48), patch=8, dim=12, depth=1, heads=2)
    options = {"dim": 20, "depth": 2, "heads": 2, "latents": 5, **options}
    return VisionLanguageModel(encoder, small_scenes().lexicon, connector=connector, **options).eval()


def batch(count=7, split="train"):
    return small_scenes().batch(split, torch.arange(count), seed=0, epoch=0, train=False)
