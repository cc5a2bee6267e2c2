"""The attentions of a Hugging Face model in which modalities meet, and what each of them learns."""

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
    """An attention, the width of a head and the number of them."""

    module: nn.Module
    dim: int
    heads: int


class MODALayer(nn.Module):
    """What one attention of a Hugging Face model learns: its aligner, and how self and cross are joined."""

    def __init__(self, dim: int, heads: int, num_modalities: int, merge: Merge, options: dict[str, Any]) -> None:
        super().__init__()
        self.aligner = DuplexAligner(dim, num_modalities, **options)
        self.gate = nn.Parameter(torch.zeros(heads, 1)) if merge == "gate" else None
        self.join = nn.Parameter(torch.eye(dim).repeat(2, 1) / 2) if merge == "concat" else None

    def forward(self, key: Tensor, value: Tensor, **known: Any) -> Aligned:
        return self.aligner(key, value, **known)


def find_moda_targets(root: nn.Module, parts: Submodels) -> dict[str, MODATarget]:
    """By path, all attentions in which modalities may meet: not those of an image encoder, and no cross-attention.

    Raises:
        ConfigError: there is none, or the model has MODA already.
    """
    found = {}
    for path, module in root.named_modules():
        dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
        if not (ATTENTION.search(type(module).__name__) and isinstance(dim, int)) or parts.is_cross(module):
            continue
        if parts.encoder is None and (not parts.others or parts.unimodal_kind(module) is None):
            found[path] = MODATarget(module, dim, _heads(module))
        if hasattr(module, "moda"):
            raise ConfigError(
                "apply_moda", expected="a model without MODA", got=f"one that has it at {path}",
                fix="Call remove() of what apply_moda returned first.",
            )  # fmt: skip
    if not found:
        raise ConfigError(
            "apply_moda", expected="a decoder, or an encoder, in which tokens of several modalities meet",
            got=f"{type(root).__name__}, which has no such attention",
        )  # fmt: skip
    return found


def _heads(module: nn.Module) -> int:
    holders = (module, getattr(module, "config", None))
    said = (getattr(holder, name, None) for holder in holders for name in ("num_heads", "num_attention_heads"))
    return next((count for count in said if isinstance(count, int)), 1)
