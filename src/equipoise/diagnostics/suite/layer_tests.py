"""What is seen inside a fusion while it runs: attention of every layer and head, and how different its tokens stay."""

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
    """Whether a fusion has attention of ours, which ``watch`` can see."""
    return any(isinstance(part, Attention) for part in fusion.modules())


@contextmanager
def residuals(fusion: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collects, while the fusion runs, the relative residual of the tokens behind each block.

    Yields:
        name of the block -> (sample,) for each batch; "input" is what the first block is given. Blocks that pass on one
        row alone are left out: a single token is always like itself.
    """
    found: dict[str, list[Tensor]] = {}
    blocks = (Block, PostNormBlock)
    names: dict[nn.Module, str] = {part: name for name, part in fusion.named_modules() if isinstance(part, blocks)}

    def look(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        tokens = output.output if isinstance(output, Attended) else output
        mask = kwargs.get("mask")
        mask = mask if mask is not None and mask.ndim == 2 else None
        if block is next(iter(names)) and args[0].shape[1] > 1:
            found.setdefault("input", []).append(_residual(args[0], mask))
        if tokens.shape[1] > 1:
            found.setdefault(names[block], []).append(_residual(tokens, mask))

    handles = [block.register_forward_hook(look, with_kwargs=True) for block in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _residual(tokens: Tensor, mask: Tensor | None) -> Tensor:
    fits = mask is not None and mask.shape == tokens.shape[:2]
    return rank_collapse(tokens, mask=mask if fits else None).whole[0]


def collapse_rows(found: Mapping[str, list[Tensor]]) -> list[dict[str, Any]]:
    """Mean and deviation of the residual of each layer, in the order in which they ran."""
    rows = []
    for layer, parts in found.items():
        values = torch.cat(parts).double()
        values = values[~values.isnan()]
        if len(values):
            rows.append({"layer": layer, "mean": float(values.mean()), "std": float(values.std(correction=0))})
    return rows


def attention_rows(seen: AttentionRecord) -> list[dict[str, Any]]:
    """Each layer with attention over several modalities: what its heads give to whom; None where nobody has any.

    Returns:
        {"site", "names", "share" [head][modality], "special" [head], "by_query" [head][modality of query][modality],
        or None where only a class token reads}, JSON-able.
    """
    rows = []
    for site in seen.layers:
        share, reading = seen.share(site), by_query(seen, site)
        rows.append(
            {
                "site": site,
                "names": list(seen.names),
                "share": _plain(share.nanmean(dim=0)),
                "special": _plain(seen.special(site).nanmean(dim=0)),
                "by_query": None if reading is None else _plain(reading.nanmean(dim=0)),
            }
        )
    return rows


def by_query(seen: AttentionRecord, site: str) -> Tensor | None:
    """(sample, head, modality of query, modality), where tokens of the modalities read; None where they do not."""
    try:
        found = seen.by_query(site)
    except ConfigError:
        # A stream that reads another one has queries of a modality that the layer is not told.
        return None
    return None if bool(found.isnan().all()) else found


def gaps(seen: AttentionRecord) -> dict[str, float] | None:
    """modality -> attention gap in percent over the layers in which tokens of the modalities read; None without any."""
    tables = [found for site in seen.layers if (found := by_query(seen, site)) is not None]
    if not tables or len(seen.names) < 2:
        return None
    # Layers may differ in heads, and each counts as one.
    each = torch.stack([attention_gap(table[None]) for table in tables])
    return dict(zip(seen.names, each.nanmean(dim=0).tolist(), strict=True))


def _plain(values: Tensor) -> list[Any]:
    """As lists, with None for NaN."""
    if values.ndim > 1:
        return [_plain(part) for part in values]
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]
