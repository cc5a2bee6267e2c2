"""Similarity of queries to the keys of each modality: sums per batch, and their total over the end of an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...geometry import VANISHING, mean_keys, membership
from ...nn.distributed import all_reduce_sum

Indicator = Literal["cosine", "logit", "mass", "mass_per_token"]
EXTRA = 3
"""Columns after the vector sum: indicator, token count, sample count."""


def query_key_sums(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch keyhead key dim"],
    modality: Int[Tensor, ...],
    num_modalities: int,
    *,
    valid: Bool[Tensor, "batch key"] | None = None,
    rows: Bool[Tensor, "batch query"] | None = None,
    indicator: Indicator = "cosine",
) -> Float[Tensor, "head modality1 dim3"]:
    """Computes the sums of one batch for RollingQ's statistics; they can be added over batches and processes.

    Samples whose queries or keys are not finite, or have a norm that overflows, are excluded, so the sums are finite.
    Keys with ``valid`` False and queries with ``rows`` False have no effect.

    Args:
        query: (batch, head, query, dim), already rotated.
        key: (batch, key head, key, dim); query head h uses key head h // (heads / key heads).
        modality: (key,) or (batch, key) labels, -1 = special token.
        num_modalities: M.
        valid: (batch, key), False for masked keys.
        rows: (batch, query), False for queries to exclude.
        indicator: similarity of a sample, mean over its queries: ``"cosine"`` of query and mean key; ``"logit"`` their
            scaled dot product; ``"mass"`` the attention share, where special tokens take part of the mass;
            ``"mass_per_token"`` the share among the modalities, each divided by its number of tokens.

    Returns:
        (head, M + 1, dim + 3) float64. Row m < M: sum over the samples that have m of the mean key, the indicator, the
        number of its tokens, and 1. Row M: sum of the mean query, 0, 0, and the number of samples.

    Reference: RollingQ (ICML 2025), eq. 3 and 9.
    """
    query, key = (x if x.dtype == torch.float64 else x.float() for x in (query.detach(), key.detach()))
    batch, heads, _, dim = query.shape
    # Fill with zeros: a weight of zero does not remove NaN.
    key = key if valid is None else key.masked_fill(~valid[:, None, :, None], 0.0)
    query = query if rows is None else query.masked_fill(~rows[:, None, :, None], 0.0)
    member = membership(modality.to(key.device), num_modalities, batch, valid)
    # Concatenate the heads in the last dimension: this is a view, computing head by head would copy the keys.
    means, counts = mean_keys(key.transpose(1, 2).flatten(2)[:, None], member)
    means = means[:, 0].unflatten(-1, (-1, dim)).transpose(1, 2).repeat_interleave(heads // key.shape[1], dim=1)
    similarity, mean_query = _similarity(query, key, means, member, valid, indicator), query
    present = counts > 0
    counted = torch.ones_like(present[:, 0])
    if rows is None:
        similarity, mean_query = similarity.mean(dim=2), query.mean(dim=2)
    else:
        counted = counted & rows.any(dim=-1)
        chosen = rows.to(query.dtype)[:, None, None]
        part = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)
        similarity, mean_query = (part @ similarity)[:, :, 0], (part @ query)[:, :, 0]
    per_sample = torch.cat(
        [means, torch.stack([similarity, counts[:, None].expand_as(similarity), torch.ones_like(similarity)], -1)], -1
    )
    # Sum squares, to exclude samples whose norms overflow.
    squares = per_sample.square().flatten(1).sum(dim=1) + mean_query.square().flatten(1).sum(dim=1)
    counted = counted & squares.isfinite()
    excluded = ~(present & counted[:, None])[:, None, :, None]
    sums = query.new_zeros(heads, num_modalities + 1, dim + EXTRA, dtype=accumulator(query.device))
    sums[:, :-1] = per_sample.masked_fill(excluded, 0.0).sum(dim=0, dtype=sums.dtype)
    sums[:, -1, :dim] = mean_query.masked_fill(~counted[:, None, None], 0.0).sum(dim=0, dtype=sums.dtype)
    sums[:, -1, -1] = counted.sum()
    return sums


def accumulator(device: torch.device) -> torch.dtype:
    """Returns float64 if the device supports it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def _similarity(
    query: Tensor, key: Tensor, means: Tensor, member: Tensor, valid: Tensor | None, indicator: Indicator
) -> Tensor:
    """Returns (batch, head, query, modality) similarities."""
    scale = 1.0 / math.sqrt(query.shape[-1])
    if indicator in ("cosine", "logit"):
        products = query @ means.mT
        if indicator == "logit":
            return products * scale
        norms = query.norm(dim=-1)[..., None] * means.norm(dim=-1)[:, :, None]
        return (products / norms.clamp(min=VANISHING)).clamp(-1.0, 1.0)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.mT * scale
    visible = valid if indicator == "mass" else member.any(dim=1)
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    mass = torch.softmax(logits, dim=-1).nan_to_num(0.0) @ member[:, None].mT.to(logits.dtype)
    if indicator == "mass":
        return mass
    per_token = mass / member.sum(dim=-1).clamp(min=1)[:, None, None]
    return per_token / per_token.sum(dim=-1, keepdim=True).clamp(min=VANISHING)


@dataclass(frozen=True)
class Means:
    """Statistics of one head in float64, as arguments of ``rolling_query``."""

    query: Tensor
    keys: dict[str, Tensor]
    imbalance: dict[str, float]
    tokens: dict[str, float]


class RunningSums:
    """The sums of the last ``tail`` batches, or of all batches since the last reset if ``tail`` is None.

    Not a buffer, because data-parallel training broadcasts the buffers of the first process at every step, and each
    process must keep its own sums until they are reduced.
    """

    def __init__(self, heads: int, names: tuple[str, ...], dim: int, tail: int | None) -> None:
        self.names, self.tail, self.dim = names, tail, dim
        self.window = torch.zeros(tail or 1, heads, len(names) + 1, dim + EXTRA, dtype=torch.float64)
        self.cursor = 0

    def add(self, sums: Tensor, *, keep_all: bool = False) -> None:
        """Adds one batch; with ``keep_all`` no batch drops out of the window."""
        if self.window.device != sums.device:
            self.window = self.window.to(sums.device, sums.dtype)
        if self.tail is None or keep_all:
            self.window[0] += sums
        else:
            self.window[self.cursor % self.tail] = sums
        self.cursor += 1

    def reset(self) -> None:
        self.window.zero_()
        self.cursor = 0

    def total(self, device: torch.device) -> Tensor:
        """Returns (head, modality + 1, dim + 3) sums over the window and over all processes.

        ``device`` is the model's, so that a process without batches can take part in the reduction.
        """
        return all_reduce_sum(self.window.sum(dim=0).to(device, accumulator(device)))

    def means(self, total: Tensor, head: int) -> Means:
        """Converts the sums of one head to means; modalities that no sample has are left out."""
        *rows, query = total[head].cpu().double()
        observed = {name: row for name, row in zip(self.names, rows, strict=True) if row[-1] > 0}
        return Means(
            query=query[: self.dim] / query[-1].clamp(min=1),
            keys={name: row[: self.dim] / row[-1] for name, row in observed.items()},
            imbalance={name: float(row[self.dim] / row[-1]) for name, row in observed.items()},
            tokens={name: float(row[self.dim + 1] / row[-1]) for name, row in observed.items()},
        )

    def state(self) -> Tensor:
        """Returns the state as one tensor, which any checkpoint format can store."""
        cursor = torch.tensor([float(self.cursor)], dtype=torch.float64)
        return torch.cat([cursor, self.window.flatten().cpu().double()])

    def load(self, state: Tensor) -> None:
        """Loads a state; a state of another window length, or with non-finite values, resets the window."""
        if state.numel() == self.window.numel() + 1 and bool(state.isfinite().all()):
            self.cursor = int(state[0])
            self.window = state[1:].to(self.window.device, self.window.dtype).reshape(self.window.shape).clone()
        else:
            self.reset()


def key_mask(mask: Tensor | None, batch: int, keys: int) -> Bool[Tensor, "batch key"] | None:
    """Reduces any mask of an attention layer to (batch, key): True for keys that some query attends to."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    while mask.ndim > 2:
        mask = mask.any(dim=-2) if mask.ndim == 3 else mask.any(dim=1)
    return mask.expand(batch, keys)
