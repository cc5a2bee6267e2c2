"""Measurements inside a fusion: attention of each layer and head, and residuals of the token representations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...nn.attention import Attended
from ...nn.transformer import Attention, Block, PostNormBlock
from ...recording import AttentionRecord
from ..attention_gap_test import attention_gap
from ..rank_collapse_test import rank_collapse


def attends(fusion: nn.Module) -> bool:
    """Whether a fusion has attention layers of equipoise, which ``watch`` records."""
    return any(isinstance(part, Attention) for part in fusion.modules())


@contextmanager
def residuals(fusion: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collects the relative residual of the tokens after each block inside the context.

    Yields:
        name of the block -> (sample,) for each batch; "input" is the input of the first block. Blocks with a single
        output token are excluded, since their residual is always 0.
    """
    collected: dict[str, list[Tensor]] = {}
    blocks = (Block, PostNormBlock)
    names: dict[nn.Module, str] = {part: name for name, part in fusion.named_modules() if isinstance(part, blocks)}

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        tokens = output.output if isinstance(output, Attended) else output
        mask = kwargs.get("mask")
        mask = mask if mask is not None and mask.ndim == 2 else None
        if block is next(iter(names)) and args[0].shape[1] > 1:
            collected.setdefault("input", []).append(_residual(args[0], mask))
        if tokens.shape[1] > 1:
            collected.setdefault(names[block], []).append(_residual(tokens, mask))

    handles = [block.register_forward_hook(record, with_kwargs=True) for block in names]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def _residual(tokens: Tensor, mask: Tensor | None) -> Tensor:
    fits = mask is not None and mask.shape == tokens.shape[:2]
    return rank_collapse(tokens, mask=mask if fits else None).whole[0]


def collapse_rows(residuals: Mapping[str, list[Tensor]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of the residual of each layer, in calling order."""
    rows = []
    for layer, parts in residuals.items():
        values = torch.cat(parts).double()
        values = values[~values.isnan()]
        if len(values):
            rows.append({"layer": layer, "mean": float(values.mean()), "std": float(values.std(correction=0))})
    return rows


def attention_rows(record: AttentionRecord) -> list[dict[str, Any]]:
    """Attention shares of each layer with several modalities; None without any sample.

    Returns:
        {"site", "names", "share" [head][modality], "special" [head], "by_query" [head][modality of query][modality],
        or None if only special tokens attend}, JSON-able.
    """
    rows = []
    for site in record.layers:
        share, table = record.share(site), by_query(record, site)
        rows.append(
            {
                "site": site,
                "names": list(record.names),
                "share": _plain(share.nanmean(dim=0)),
                "special": _plain(record.special(site).nanmean(dim=0)),
                "by_query": None if table is None else _plain(table.nanmean(dim=0)),
            }
        )
    return rows


def by_query(record: AttentionRecord, site: str) -> Tensor | None:
    """(sample, head, modality of query, modality) shares; None if no query has a modality."""
    try:
        table = record.by_query(site)
    except ConfigError:
        # In cross-attention between streams the modality of the queries is not available in the layer.
        return None
    return None if bool(table.isnan().all()) else table


def gaps(record: AttentionRecord) -> dict[str, float] | None:
    """modality -> attention gap in percent, over the layers with queries of known modality; None without any."""
    tables = [table for site in record.layers if (table := by_query(record, site)) is not None]
    if not tables or len(record.names) < 2:
        return None
    # Layers may have different numbers of heads; each layer has the same weight.
    each = torch.stack([attention_gap(table[None]) for table in tables])
    return dict(zip(record.names, each.nanmean(dim=0).tolist(), strict=True))


def _plain(values: Tensor) -> list[Any]:
    """Nested lists with None for NaN."""
    if values.ndim > 1:
        return [_plain(part) for part in values]
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]
