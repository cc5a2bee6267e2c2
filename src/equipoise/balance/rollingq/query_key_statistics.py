"""How queries lie to the keys of each modality: per-batch sums, and their running total over an epoch's tail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...geometry import VANISHING, mean_keys, membership

Indicator = Literal["cosine", "logit", "mass", "mass_per_token"]
EXTRA = 3
"""Columns after the vector sum: the indicator, the token count, the sample count."""


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
    """Sums over one batch from which all of RollingQ's statistics follow; they can be added over batches and processes.

    A sample whose query or keys are not finite, or too large to have a length, is left out, so the sums are finite.
    Values of keys that are not valid and of rows that do not count have no effect.

    Args:
        query: (batch, head, query, dim), already rotated.
        key: (batch, key head, key, dim); query head h reads key head h // (heads / key heads).
        modality: (key,) or (batch, key) labels, -1 = special.
        num_modalities: M.
        valid: (batch, key), True = the key takes part.
        rows: (batch, query), True = the query counts.
        indicator: what measures closeness for each sample, mean over its queries: ``"cosine"`` of query and mean key;
            ``"logit"`` their scaled product; ``"mass"`` the attention share, special tokens having theirs;
            ``"mass_per_token"`` the shares of the modalities alone, each divided by its number of tokens.

    Returns:
        (head, M + 1, dim + 3) float64. Row m < M: sum over the samples that have m of the mean key, the indicator, the
        number of its tokens, and 1. Row M: sum of the mean query, 0, 0, and the number of samples.

    Reference: RollingQ (ICML 2025), eq. 3 and 9; spec 2.8, 2.9 and 2.12.
    """
    query, key = (x if x.dtype == torch.float64 else x.float() for x in (query.detach(), key.detach()))
    batch, heads, _, dim = query.shape
    # Set to zero, since a weight of zero does not remove NaN.
    key = key if valid is None else key.masked_fill(~valid[:, None, :, None], 0.0)
    query = query if rows is None else query.masked_fill(~rows[:, None, :, None], 0.0)
    member = membership(modality.to(key.device), num_modalities, batch, valid)
    # With all heads side by side in one row the keys are read where they lie; head by head they would be copied.
    means, counts = mean_keys(key.transpose(1, 2).flatten(2)[:, None], member)
    means = means[:, 0].unflatten(-1, (-1, dim)).transpose(1, 2).repeat_interleave(heads // key.shape[1], dim=1)
    close, mean_query = _closeness(query, key, means, member, valid, indicator), query
    present = counts > 0
    counted = torch.ones_like(present[:, 0])
    if rows is None:
        close, mean_query = close.mean(dim=2), query.mean(dim=2)
    else:
        counted = counted & rows.any(dim=-1)
        chosen = rows.to(query.dtype)[:, None, None]
        part = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)
        close, mean_query = (part @ close)[:, :, 0], (part @ query)[:, :, 0]
    per_sample = torch.cat(
        [means, torch.stack([close, counts[:, None].expand_as(close), torch.ones_like(close)], -1)], -1
    )
    # Of squares, because numbers whose squares overflow have no length.
    squares = per_sample.square().flatten(1).sum(dim=1) + mean_query.square().flatten(1).sum(dim=1)
    counted = counted & squares.isfinite()
    left_out = ~(present & counted[:, None])[:, None, :, None]
    sums = query.new_zeros(heads, num_modalities + 1, dim + EXTRA, dtype=accumulator(query.device))
    sums[:, :-1] = per_sample.masked_fill(left_out, 0.0).sum(dim=0, dtype=sums.dtype)
    sums[:, -1, :dim] = mean_query.masked_fill(~counted[:, None, None], 0.0).sum(dim=0, dtype=sums.dtype)
    sums[:, -1, -1] = counted.sum()
    return sums


def accumulator(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _closeness(
    query: Tensor, key: Tensor, means: Tensor, member: Tensor, valid: Tensor | None, indicator: Indicator
) -> Tensor:
    """(batch, head, query, modality)."""
    scale = 1.0 / math.sqrt(query.shape[-1])
    if indicator in ("cosine", "logit"):
        products = query @ means.mT
        if indicator == "logit":
            return products * scale
        norms = query.norm(dim=-1)[..., None] * means.norm(dim=-1)[:, :, None]
        return (products / norms.clamp(min=VANISHING)).clamp(-1.0, 1.0)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.mT * scale
    kept = valid if indicator == "mass" else member.any(dim=1)
    if kept is not None:
        logits = logits.masked_fill(~kept[:, None, None], -torch.inf)
    mass = torch.softmax(logits, dim=-1).nan_to_num(0.0) @ member[:, None].mT.to(logits.dtype)
    if indicator == "mass":
        return mass
    per_token = mass / member.sum(dim=-1).clamp(min=1)[:, None, None]
    return per_token / per_token.sum(dim=-1, keepdim=True).clamp(min=VANISHING)


@dataclass(frozen=True)
class Means:
    """Statistics of one head, in float64: what ``rolling_query`` reads."""

    query: Tensor
    keys: dict[str, Tensor]
    imbalance: dict[str, float]
    tokens: dict[str, float]


class RunningSums:
    """The sums of the last ``tail`` batches (of all since the last reset, where ``tail`` is None).

    It lives outside the module's buffers, because data-parallel training copies the buffers of the first process over
    those of all others at every step, and each process must keep its own sums until they are added.
    """

    def __init__(self, heads: int, names: tuple[str, ...], dim: int, tail: int | None) -> None:
        self.names, self.tail, self.dim = names, tail, dim
        self.window = torch.zeros(tail or 1, heads, len(names) + 1, dim + EXTRA, dtype=torch.float64)
        self.cursor = 0

    def add(self, sums: Tensor, *, keep_all: bool = False) -> None:
        """Takes in one batch; ``keep_all`` lets no batch drop out of the window."""
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
        """(head, modality + 1, dim + 3): over the window, and over all processes where there are several.

        ``device`` is the model's: a process that saw no batch must add its zeros where the others have their sums.
        """
        total = self.window.sum(dim=0).to(device, accumulator(device))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total

    def means(self, total: Tensor, head: int) -> Means:
        """Turns the sums of one head into means; a modality that no sample has is left out."""
        *rows, query = total[head].cpu().double()
        seen = {name: row for name, row in zip(self.names, rows, strict=True) if row[-1] > 0}
        return Means(
            query=query[: self.dim] / query[-1].clamp(min=1),
            keys={name: row[: self.dim] / row[-1] for name, row in seen.items()},
            imbalance={name: float(row[self.dim] / row[-1]) for name, row in seen.items()},
            tokens={name: float(row[self.dim + 1] / row[-1]) for name, row in seen.items()},
        )

    def state(self) -> Tensor:
        """Everything in one tensor, so that a checkpoint of any format can hold it."""
        cursor = torch.tensor([float(self.cursor)], dtype=torch.float64)
        return torch.cat([cursor, self.window.flatten().cpu().double()])

    def load(self, state: Tensor) -> None:
        """Loads a state; one of another window length, or with numbers that are not finite, empties the window."""
        if state.numel() == self.window.numel() + 1 and bool(state.isfinite().all()):
            self.cursor = int(state[0])
            self.window = state[1:].to(self.window.device, self.window.dtype).reshape(self.window.shape).clone()
        else:
            self.reset()


def key_mask(mask: Tensor | None, batch: int, keys: int) -> Bool[Tensor, "batch key"] | None:
    """From whatever mask an attention layer is called with: a key counts when some query may see it."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    while mask.ndim > 2:
        mask = mask.any(dim=-2) if mask.ndim == 3 else mask.any(dim=1)
    return mask.expand(batch, keys)
