"""Assigns the queries of an attention call under ``generate`` to the tokens that they generate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..tokens.token_batch import SPECIAL
from .attention_call import AttentionCall
from .generation_loops import Columns, Loop
from .token_labels import LabeledKeys


def assign_queries(call: AttentionCall, known: LabeledKeys, loop: Loop) -> Iterator[LabeledKeys]:
    """Yields the labels once for each group of queries, with only that group valid."""
    for columns in loop.columns():
        if -columns.last <= call.sizes[2]:
            yield _select_group(call, known, loop, columns)


def _select_group(call: AttentionCall, known: LabeledKeys, loop: Loop, columns: Columns) -> LabeledKeys:
    batch, _, rows, total = call.sizes
    device = call.query.device
    valid = torch.zeros(batch, rows, dtype=torch.bool, device=device)
    last = rows + columns.last
    first = 0 if columns.first is None else max(rows + columns.first, 0)
    valid[:, first : last + 1] = True
    if known.valid is not None:
        valid &= known.valid.to(device)
    alive = None
    if loop.done is not None and len(loop.done) == batch:
        alive = ~loop.done.to(device)
        valid &= alive[:, None]
    writes = torch.zeros_like(valid)
    writes[:, last] = columns.writes
    keys = known.keys
    if known.own and known.length is not None and columns.last < -1:
        # These queries precede draft tokens, which they do not attend to.
        positions = torch.arange(known.start, known.start + total, device=keys.device)
        keys = keys.masked_fill(positions > known.length + columns.last, SPECIAL)
    return replace(
        known, keys=keys, valid=valid, writes=writes, alive=alive, continues=not loop.first, text=loop.text,
        partial=loop.partial, step=columns.step,
    )  # fmt: skip
