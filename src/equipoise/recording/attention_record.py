"""``AttentionRecord``: the attention shares that ``watch`` measured, by layer, sample and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..io.table_display import to_pandas
from ..tokens.token_batch import SPECIAL
from .attention_call import AttentionCall
from .batch_record import BatchRecord, sum_shares
from .generation_loops import Chosen, Loop, Step
from .share_table import ShareTable
from .token_labels import LabeledKeys, recorded_rows

RECORDABLE = (
    "watch records equipoise's layers, nn.MultiheadAttention, F.scaled_dot_product_attention, softmax over keys and "
    "Hugging Face's attention interface; fused extensions and attention without softmax cannot be recorded."
)


@dataclass(eq=False)
class LayerRecord:
    """The measurements of one layer, one ``BatchRecord`` for each batch."""

    names: tuple[str, ...]
    backend: str
    unimodal: bool
    blocks: list[BatchRecord] = field(default_factory=list)

    def add(self, block: BatchRecord, *, continues: bool, alive: Tensor | None = None) -> None:
        """Adds queries to the samples of the last block if ``continues``, else a block of new samples."""
        if continues and self.blocks and self.blocks[-1].share.shape == block.share.shape:
            self.blocks[-1].add(block, alive)
        else:
            self.blocks.append(block)


class AttentionRecord:
    """Attention shares recorded by ``watch``. Results are moved to the CPU when a method returns them.

    Attributes:
        queries: the queries whose attention is recorded.
        session: the session that fills the record; None for a record that is not attached to a model.
    """

    replaces_output = False

    def __init__(self, labeler: Any, queries: str | Tensor, *, tokens: bool = False) -> None:
        self._labeler, self.queries, self._with_tokens = labeler, queries, tokens
        self._layers: dict[str, LayerRecord] = {}
        self._missing: dict[str, str] = {}
        self._pending: list[tuple[Step, str, LayerRecord, BatchRecord]] = []
        """Steps of ``generate`` that are not assigned to a returned sequence yet."""
        self._encoder_blocks: list[tuple[LayerRecord, int]] = []
        """Blocks recorded before the decoding loop, to be repeated if ``generate`` returns a sample several times."""
        self.session: Any = None

    # Called by the session.

    @torch.no_grad()
    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        rows = recorded_rows(self.queries, call, known)
        if isinstance(rows, str):
            return self.on_missing(layer, rows)
        if rows is None:
            return None
        block = sum_shares(call, known, rows, with_tokens=self._with_tokens)
        if known.samples is not None:
            block = block.folded(known.samples)
        if known.step is not None:
            self._pending.append((known.step, layer, LayerRecord(known.names, backend, known.unimodal), block))
            return None
        record = self._layers.setdefault(layer, LayerRecord(known.names, backend, known.unimodal))
        record.add(block, continues=known.continues, alive=known.alive)
        if known.beside:
            self._encoder_blocks.append((record, len(record.blocks) - 1))
        return None

    @torch.no_grad()
    def settle(self, loop: Loop, chosen: Callable[[Step], Chosen | None], rows: int) -> None:
        """Adds the steps of a finished decoding loop to the ``rows`` sequences that it returned."""
        begun: set[str] = set()
        waiting, self._pending = self._pending, []
        for step, layer, like, block in waiting:
            if step.loop is not loop:
                self._pending.append((step, layer, like, block))
            elif (selection := chosen(step)) is not None:
                keep = selection.keep.to(block.share.device)
                part = block.take(selection.index.to(block.share.device), keep)
                record = self._layers.setdefault(layer, like)
                record.add(part, continues=step.draft > 0 or layer in begun, alive=keep)
                begun.add(layer)
        for record, position in self._encoder_blocks:
            block = record.blocks[position]
            if rows > len(block.share) and rows % len(block.share) == 0:
                index = torch.arange(rows, device=block.share.device) // (rows // len(block.share))
                record.blocks[position] = block.take(index)
        self._encoder_blocks = []

    def discard(self, loop: Loop) -> None:
        """Drops the pending steps of a decoding loop that has ended; they belong to no returned sequence."""
        self._pending, self._encoder_blocks = [entry for entry in self._pending if entry[0].loop is not loop], []

    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def on_missing(self, layer: str, reason: str) -> None:
        self._missing.setdefault(layer, reason)

    # Public results.

    @property
    def names(self) -> tuple[str, ...]:
        """Modality names, in the order of the last axis of every share."""
        return self._layers[self.layers[0]].names if self._layers else self._labeler.names

    @property
    def layers(self) -> list[str]:
        """Layers with attention over several modalities, in calling order; all layers if all are unimodal."""
        joint = [name for name, record in self._layers.items() if not record.unimodal]
        return joint or list(self._layers)

    @property
    def unimodal_layers(self) -> list[str]:
        """Layers inside unimodal encoders, where the share of the modality is 1 by construction."""
        return [name for name, record in self._layers.items() if record.unimodal]

    @property
    def backends(self) -> dict[str, str]:
        """layer -> the function or backend by which its attention was intercepted."""
        return {name: record.backend for name, record in self._layers.items()}

    @property
    def missing(self) -> dict[str, str]:
        """layer -> why its attention, or that of some batches, could not be attributed to modalities."""
        return dict(self._missing)

    def missing_summary(self) -> str:
        """Summarizes ``missing`` in one sentence: the first layer, the reason, and the number of other layers."""
        layer, reason = next(iter(self._missing.items()))
        what = f"some batches of '{layer}' are" if layer in self._layers else f"'{layer}' is"
        others = len(self._missing) - 1
        more = f" ({others} other{'s' if others > 1 else ''} in `missing`)" if others else ""
        return f"{what} not in the table: {reason}{more}"

    def share(self, layer: str, *, exclude_top_k: int = 0) -> Float[Tensor, "sample head modality"]:
        """Returns the share of attention on each modality, averaged over the recorded queries.

        Args:
            layer: one of ``layers`` or ``unimodal_layers``.
            exclude_top_k: excludes this many tokens with the most attention (most likely attention sinks) and
                normalizes over the others; requires ``watch(..., tokens=True)``.

        Returns:
            (sample, head, modality), float32. The modalities sum to less than 1 if special tokens or sinks get
            attention. NaN for a sample without recorded queries.

        Raises:
            ConfigError: an unknown layer, or no attention was recorded; the message has the reason.
        """
        record = self._layer_record(layer)
        if exclude_top_k:
            return self._share_without_top(layer, record, exclude_top_k)
        return _concatenate([b.share / b.count[:, None, None] for b in record.blocks])

    def special(self, layer: str) -> Float[Tensor, "sample head"]:
        """Returns the share of special tokens, such as class tokens and keys that the layer adds itself."""
        rest = 1 - self.share(layer).sum(dim=-1) - self.sink(layer)
        return rest.clamp(min=0).masked_fill(rest < 1e-6, 0.0)

    def sink(self, layer: str) -> Float[Tensor, "sample head"]:
        """Returns the share of a learned attention sink, a key without a value; 0 for layers without one."""
        return _concatenate([b.sink / b.count[:, None] for b in self._layer_record(layer).blocks])

    def per_token(self, layer: str) -> Float[Tensor, "sample head modality"]:
        """Returns the share divided by the number of tokens of the modality; NaN for a modality without tokens."""
        return _concatenate(
            [b.share / b.count[:, None, None] / b.keys[:, None] for b in self._layer_record(layer).blocks]
        )

    def by_query(self, layer: str) -> Float[Tensor, "sample head query_modality modality"]:
        """Returns the share for each query modality: row m averages the recorded queries of modality m.

        Raises:
            ConfigError: the modality of the layer's queries is unknown.
        """
        blocks = self._layer_record(layer).blocks
        if any(b.by_query is None for b in blocks):
            raise ConfigError(
                "AttentionRecord.by_query",
                expected="a layer whose queries have known modalities",
                got=f"'{layer}', whose keys come from another sequence",
            )
        return _concatenate([b.by_query / b.query_count[:, None, :, None] for b in blocks])  # type: ignore[operator, index]

    def tokens(self, layer: str) -> Float[Tensor, "sample head key"]:
        """Returns the attention on each key, averaged over the recorded queries; NaN past the end of a sample.

        Raises:
            ConfigError: recorded without ``tokens=True``.
        """
        blocks = self._layer_record(layer).blocks
        self._need_tokens()
        longest = max(b.tokens.shape[-1] for b in blocks)  # type: ignore[union-attr]
        parts = [b.tokens / b.count[:, None, None] for b in blocks]  # type: ignore[operator]
        return _concatenate([torch.nn.functional.pad(p, (0, longest - p.shape[-1]), value=math.nan) for p in parts])

    def labels(self, layer: str) -> Int[Tensor, "sample key"]:
        """Returns the modality index of each key, -1 for special tokens and padding; requires ``tokens=True``."""
        blocks = self._layer_record(layer).blocks
        self._need_tokens()
        longest = max(b.labels.shape[-1] for b in blocks)  # type: ignore[union-attr]
        pad = torch.nn.functional.pad
        return torch.cat([pad(b.labels.cpu(), (0, longest - b.labels.shape[-1]), value=SPECIAL) for b in blocks])  # type: ignore[union-attr]

    def table(self) -> ShareTable:
        """Returns the shares by layer and modality, averaged over samples and heads.

        The result is a list of dicts that prints as a table and is shown as HTML in a notebook.
        """
        if not self.complete:
            raise self.nothing()
        rows = []
        for layer in self.layers:
            share = self.share(layer).nanmean(dim=(0, 1))
            row = {"layer": layer, **dict(zip(self._layers[layer].names, share.tolist(), strict=True))}
            row |= {"special": float(self.special(layer).nanmean()), "sink": float(self.sink(layer).nanmean())}
            rows.append(row)
        return ShareTable(self.names, rows, self._missing)

    def to_pandas(self) -> Any:
        """Returns a ``pandas.DataFrame`` with one row for each layer, sample, head and modality.

        Columns: layer, sample, head, modality, share.

        Raises:
            ConfigError: pandas is not installed; no attention was recorded.
        """
        if not self.complete:
            raise self.nothing()
        rows = [
            {"layer": layer, "sample": sample, "head": head, "modality": name, "share": share}
            for layer in self.layers
            for sample, heads in enumerate(self.share(layer).tolist())
            for head, shares in enumerate(heads)
            for name, share in zip(self._layers[layer].names, shares, strict=True)
        ]
        return to_pandas(rows, "AttentionRecord")

    def __repr__(self) -> str:
        return str(self.table()) if self.complete else f"AttentionRecord without attention: {self.nothing()}"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_() if self.complete else f"<p>{escape(repr(self))}</p>"

    @property
    def complete(self) -> bool:
        """Whether attention was recorded, and not only in unimodal encoders while other layers are missing."""
        return bool(self._layers) and not (self._missing and all(record.unimodal for record in self._layers.values()))

    def nothing(self) -> ConfigError:
        """Returns the error for a model of which no attention was recorded."""
        if self._missing:
            layer, reason = next(iter(self._missing.items()))
            more = f" ({len(self._missing) - 1} others for similar reasons)" if len(self._missing) > 1 else ""
            got = f"'{layer}', but {reason}{more}"
            fix = "Give one label for every key: watch(model, modality=labels, names=('text', 'image'))."
            if "intercepted" in reason:
                fix = RECORDABLE
        elif self.session is not None and not self.session.called and self.session.threads.unrecorded:
            got = f"none, because the model ran in another thread, '{self.session.threads.unrecorded}'"
            fix = "Open the block in the thread that runs the model, or start that thread in the block."
        elif self.session is not None and not self.session.called:
            got, fix = "none, because the model did not run in the block", "Call the model inside the with block."
        else:
            got, fix = "none", f"{RECORDABLE} For other models, pass modality= with one label for every key."
        return ConfigError("watch", expected="attention whose keys have known modalities", got=got, fix=fix)

    def _layer_record(self, name: str) -> LayerRecord:
        if not self._layers:
            raise self.nothing()
        if name in self._missing and name not in self._layers:
            raise ConfigError("AttentionRecord", expected="a layer whose attention was recorded", got=f"'{name}', but "
                              f"{self._missing[name]}")  # fmt: skip
        if name not in self._layers:
            raise unknown_name("AttentionRecord", "layer", name, (*self._layers, *self._missing))
        return self._layers[name]

    def _need_tokens(self) -> None:
        if not self._with_tokens:
            raise ConfigError(
                "AttentionRecord", expected="attention on single tokens", got="a record without it",
                fix="Record it: watch(model, tokens=True).",
            )  # fmt: skip

    def _share_without_top(self, layer: str, record: LayerRecord, top_k: int) -> Tensor:
        tokens, labels = self.tokens(layer).nan_to_num(0.0), self.labels(layer)
        mean = tokens.mean(dim=1)
        top = mean.topk(min(top_k, mean.shape[-1]), dim=-1).indices
        remaining = tokens.scatter(2, top[:, None].expand(-1, tokens.shape[1], -1), 0.0)
        one_hot = labels[..., None] == torch.arange(len(record.names))
        share = remaining @ one_hot.to(remaining.dtype)
        return share / remaining.sum(dim=-1, keepdim=True)


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Concatenates the samples of all blocks on the CPU."""
    return torch.cat([part.float().cpu() for part in parts])
