"""Attention with known maps between modalities, from queries and keys that are set by hand."""

import torch
from torch import nn

import equipoise as eq

NAMES = ("audio", "video", "text")
TOKENS = {"audio": ("bark", "noise", "silence"), "video": ("dog", "man", "street"), "text": ("dog", "man", "none")}
CONCEPTS = 3
EYE = torch.eye(CONCEPTS)
SWAP = EYE[[1, 0, 2]]


def planted_fusion(there=EYE, straight=EYE, on=EYE, *, names=NAMES, sharpness=40.0, dtype=torch.float32):
    """Returns a fusion whose first block has the given maps audio-video, audio-text and video-text.

    Tokens are orthogonal; query times key is ``sharpness`` where the map is 1, otherwise 0.
    """
    matrix = eq.consistency.supermatrix(
        {(0, 1): there, (0, 2): straight, (1, 2): on} if len(names) == 3 else {(0, 1): there}
    )
    dim = len(matrix)
    model = eq.FusionModel(
        {name: nn.Identity() for name in names}, eq.fusion.JointAttention(dim, depth=2, dropout=0.0), 2
    )
    layer = model.fusion.blocks[0].attention
    with torch.no_grad():
        model.fusion.cls.zero_()
        layer.query.weight.copy_(sharpness * matrix.t())
        layer.key.weight.copy_(torch.eye(dim))
        for part in (layer.query, layer.key):
            part.bias.zero_()
    return model.to(dtype)


def concept_batch(names=NAMES, *, size=5, dtype=torch.float32):
    """Returns the tokens, equal in every sample."""
    all_ = torch.eye(len(names) * CONCEPTS, dtype=dtype)
    result = {n: all_[i * CONCEPTS : (i + 1) * CONCEPTS].expand(size, -1, -1) for i, n in enumerate(names)}
    return {**result, "target": torch.arange(size) % 2}
