"""Teachers for UMT: encoders with dropout, so that the tests notice a teacher in training mode."""

import torch
from torch import nn

from helpers.fusion import DIM, FEATURES


def build_teachers(names=("audio", "image"), *, dim=DIM, dtype=torch.float64):
    torch.manual_seed(5)
    return {name: nn.Sequential(nn.Linear(FEATURES[name], dim), nn.Dropout()).to(dtype) for name in names}
