"""Multimodal attention layers of a Hugging Face model, and the parameters that MODA adds to each."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...nn.attention.modular import Merge
from ...nn.duplex import Aligned, DuplexAligner
from ...recording.submodels import Submodels

ATTENTION = re.compile(r"Attention\d?$")


class MODATarget(NamedTuple):
    """An attention layer with its head width and number of heads."""

    module: nn.Module
    dim: int
    heads: int


class MODALayer(nn.Module):
    """MODA parameters of one attention layer: its aligner, and the merge of self- and cross-attention."""

    def __init__(self, dim: int, heads: int, num_modalities: int, merge: Merge, options: dict[str, Any]) -> None:
        super().__init__()
        self.aligner = DuplexAligner(dim, num_modalities, **options)
        self.gate = nn.Parameter(torch.zeros(heads, 1)) if merge == "gate" else None
        self.join = nn.Parameter(torch.eye(dim).repeat(2, 1) / 2) if merge == "concat" else None

    def forward(self, key: Tensor, value: Tensor, **known: Any) -> Aligned:
        return self.aligner(key, value, **known)


def find_moda_targets(root: nn.Module, parts: Submodels) -> dict[str, MODATarget]:
    """Returns path -> attention layer for all layers that may attend to several modalities.

    Layers of unimodal encoders and cross-attention are excluded.

    Raises:
        ConfigError: there is no such layer, or MODA was applied already.
    """
    targets = {}
    for path, module in root.named_modules():
        dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
        if not (ATTENTION.search(type(module).__name__) and isinstance(dim, int)) or parts.is_cross(module):
            continue
        if parts.encoder is None and (not parts.others or parts.unimodal_kind(module) is None):
            targets[path] = MODATarget(module, dim, _heads(module))
        if hasattr(module, "moda"):
            raise ConfigError(
                "apply_moda", expected="a model without MODA", got=f"a model with MODA at {path}",
                fix="Call remove() on the adapter that apply_moda returned first.",
            )  # fmt: skip
    if not targets:
        raise ConfigError(
            "apply_moda", expected="a model with attention layers that attend to several modalities",
            got=f"{type(root).__name__}, which has no such layer",
        )  # fmt: skip
    return targets


def _heads(module: nn.Module) -> int:
    holders = (module, getattr(module, "config", None))
    counts = (getattr(holder, name, None) for holder in holders for name in ("num_heads", "num_attention_heads"))
    return next((count for count in counts if isinstance(count, int)), 1)
