"""What was seen: shares by site, sample and head, as a value that can be read, printed and saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..tokens.token_batch import SPECIAL
from .attention_call import AttentionCall
from .batch_record import BatchRecord, sum_shares
from .generation_loops import Chosen, Loop, Step
from .token_labels import LabeledKeys, recorded_rows


@dataclass(eq=False)
class LayerRecord:
    """All that was seen at one place."""

    names: tuple[str, ...]
    way: str
    tower: bool
    blocks: list[BatchRecord] = field(default_factory=list)

    def add(self, block: BatchRecord, *, continues: bool, alive: Tensor | None = None) -> None:
        """Further queries of the samples before, or further samples."""
        if continues and self.blocks and self.blocks[-1].share.shape == block.share.shape:
            self.blocks[-1].add(block, alive)
        else:
            self.blocks.append(block)


class ShareTableView(list):
    """Rows, one for each site; prints as a table."""

    def __init__(
        self, names: tuple[str, ...], rows: list[dict[str, Any]], missing: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(rows)
        self.names = names
        self.missing = dict(missing or {})

    def __str__(self) -> str:
        columns = self._columns()
        width = max([len("site"), *(len(row["site"]) for row in self)])
        wide = [max(7, len(name)) for name in columns]
        lines = [" ".join(["site".ljust(width), *(name.rjust(w) for name, w in zip(columns, wide, strict=True))])]
        for row in self:
            cells = (_percent(row.get(name)).rjust(w) for name, w in zip(columns, wide, strict=True))
            lines.append(" ".join([row["site"].ljust(width), *cells]))
        if self.missing:
            lines += ["", "not in the table:", *(f"  {site}: {reason}" for site, reason in self.missing.items())]
        return "\n".join(lines)

    __repr__ = __str__

    def _columns(self) -> list[str]:
        return [*self.names, "special", *(["sink"] if any(row["sink"] for row in self) else [])]

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        columns = self._columns()
        # Names of modules may hold brackets, which are no markup.
        note = "\n".join(["not in the table:", *(f"{site}: {reason}" for site, reason in self.missing.items())])
        made = RichTable(caption=Text(note) if self.missing else None, caption_justify="left")
        for name in ("site", *columns):
            made.add_column(Text(name), justify="left" if name == "site" else "right")
        for row in self:
            made.add_row(Text(row["site"]), *(_percent(row.get(name)) for name in columns))
        return made

    def _repr_html_(self) -> str:
        columns = self._columns()
        head = "".join(f"<th>{escape(name)}</th>" for name in ("site", *columns))
        rows = "".join(
            f"<tr><td>{escape(row['site'])}</td>"
            + "".join(f"<td>{_percent(row.get(name))}</td>" for name in columns)
            + "</tr>"
            for row in self
        )
        missing = "".join(f"<li>{escape(site)}: {escape(reason)}</li>" for site, reason in self.missing.items())
        note = f"<p>not in the table:</p><ul>{missing}</ul>" if missing else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}"


class AttentionRecord:
    """What ``watch`` saw. All figures come to the CPU when they are asked for.

    Attributes:
        names: modality names, in the order of the last axis of every share.
        queries: which queries were watched.
    """

    changes = False

    def __init__(self, labeler: Any, queries: str | Tensor, *, tokens: bool = False) -> None:
        self._labeller, self.queries, self._with_tokens = labeler, queries, tokens
        self._sites: dict[str, LayerRecord] = {}
        self._missed: dict[str, str] = {}
        self._open: list[tuple[Step, str, LayerRecord, BatchRecord]] = []
        """Steps of `generate` of which it is not known yet which returned sequence they belong to."""
        self._beside: list[tuple[LayerRecord, int]] = []
        """Blocks of samples that `generate` may return several times."""
        self.session: Any = None

    # What the session tells.

    @torch.no_grad()
    def see(self, site: str, way: str, call: AttentionCall, known: LabeledKeys) -> None:
        rows = recorded_rows(self.queries, call, known)
        if isinstance(rows, str):
            return self.missed(site, rows)
        if rows is None:
            return None
        block = sum_shares(call, known, rows, with_tokens=self._with_tokens)
        if known.samples is not None:
            block = block.folded(known.samples)
        if known.step is not None:
            self._open.append((known.step, site, LayerRecord(known.names, way, known.tower), block))
            return None
        place = self._sites.setdefault(site, LayerRecord(known.names, way, known.tower))
        place.add(block, continues=known.continues, alive=known.alive)
        if known.beside:
            self._beside.append((place, len(place.blocks) - 1))
        return None

    @torch.no_grad()
    def settle(self, loop: Loop, chosen: Callable[[Step], Chosen | None], rows: int) -> None:
        """A decoding loop has returned so many sequences: adds up those of its steps that led to them."""
        begun: set[str] = set()
        waiting, self._open = self._open, []
        for step, site, like, block in waiting:
            if step.loop is not loop:
                self._open.append((step, site, like, block))
            elif (found := chosen(step)) is not None:
                keep = found.keep.to(block.share.device)
                part = block.take(found.index.to(block.share.device), keep)
                place = self._sites.setdefault(site, like)
                place.add(part, continues=step.draft > 0 or site in begun, alive=keep)
                begun.add(site)
        for place, number in self._beside:
            block = place.blocks[number]
            if rows > len(block.share) and rows % len(block.share) == 0:
                index = torch.arange(rows, device=block.share.device) // (rows // len(block.share))
                place.blocks[number] = block.take(index)
        self._beside = []

    def discard(self, loop: Loop) -> None:
        """A decoding loop has ended; what has not been settled belongs to no sequence."""
        self._open, self._beside = [entry for entry in self._open if entry[0].loop is not loop], []

    def change(self, site: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def missed(self, site: str, reason: str) -> None:
        self._missed.setdefault(site, reason)

    # What the user asks.

    @property
    def names(self) -> tuple[str, ...]:
        return self._sites[self.sites[0]].names if self._sites else self._labeller.names

    @property
    def sites(self) -> list[str]:
        """Where attention over several modalities was seen, in calling order; towers where there is nothing else."""
        joint = [name for name, site in self._sites.items() if not site.tower]
        return joint or list(self._sites)

    @property
    def towers(self) -> list[str]:
        """Attention inside encoders of one modality, which gets all of it by construction."""
        return [name for name, site in self._sites.items() if site.tower]

    @property
    def ways(self) -> dict[str, str]:
        """site -> how its attention was seen: by which backend or function."""
        return {name: site.way for name, site in self._sites.items()}

    @property
    def missing(self) -> dict[str, str]:
        """site -> why its attention, or that of some batches, could not be told apart by modality."""
        return dict(self._missed)

    def missing_in_words(self) -> str:
        """What the table leaves out, in one sentence: the first layer, its reason, and how many others there are."""
        site, reason = next(iter(self._missed.items()))
        what = f"some batches of '{site}' are" if site in self._sites else f"'{site}' is"
        others = len(self._missed) - 1
        more = f" ({others} other{'s' if others > 1 else ''} in `missing`)" if others else ""
        return f"{what} not in the table: {reason}{more}"

    def share(self, site: str, *, without_top: int = 0) -> Float[Tensor, "sample head modality"]:
        """Part of the attention that falls on each modality, mean over the watched queries.

        Args:
            site: one of ``sites``, or of ``towers``.
            without_top: leaves out so many tokens that get most, sinks in all likelihood, and gives the parts of what
                remains; needs ``watch(..., tokens=True)``.

        Returns:
            (sample, head, modality), float32. With special tokens and sinks the modalities sum to less than 1. NaN for
            a sample without a watched query.

        Raises:
            ConfigError: an unknown site, or nothing seen at all, with the reason.
        """
        place = self._site(site)
        if without_top:
            return self._without(site, place, without_top)
        return _joined([b.share / b.count[:, None, None] for b in place.blocks])

    def special(self, site: str) -> Float[Tensor, "sample head"]:
        """Part that falls on special tokens, such as a class token or what the layer adds."""
        rest = 1 - self.share(site).sum(dim=-1) - self.sink(site)
        return rest.clamp(min=0).masked_fill(rest < 1e-6, 0.0)

    def sink(self, site: str) -> Float[Tensor, "sample head"]:
        """Part that a learned sink takes, a virtual key without a value; 0 where there is none."""
        return _joined([b.sink / b.count[:, None] for b in self._site(site).blocks])

    def per_token(self, site: str) -> Float[Tensor, "sample head modality"]:
        """Share divided by the number of tokens of the modality: attention of one token; NaN for no token."""
        return _joined([b.share / b.count[:, None, None] / b.keys[:, None] for b in self._site(site).blocks])

    def by_query(self, site: str) -> Float[Tensor, "sample head query_modality modality"]:
        """Share by the modality of who reads: row m is the mean over the watched queries of modality m.

        Raises:
            ConfigError: the modality of the queries is not known there.
        """
        blocks = self._site(site).blocks
        if any(b.by_query is None for b in blocks):
            raise ConfigError(
                "Seen.by_query", expected="queries whose modality is known", got=f"'{site}', which reads another stream"
            )
        return _joined([b.by_query / b.query_count[:, None, :, None] for b in blocks])  # type: ignore[operator, index]

    def tokens(self, site: str) -> Float[Tensor, "sample head key"]:
        """Attention on every single key, mean over the watched queries; NaN behind the end of shorter samples.

        Raises:
            ConfigError: watched without ``tokens=True``.
        """
        blocks = self._site(site).blocks
        self._need_tokens()
        longest = max(b.tokens.shape[-1] for b in blocks)  # type: ignore[union-attr]
        parts = [b.tokens / b.count[:, None, None] for b in blocks]  # type: ignore[operator]
        return _joined([torch.nn.functional.pad(p, (0, longest - p.shape[-1]), value=math.nan) for p in parts])

    def labels(self, site: str) -> Int[Tensor, "sample key"]:
        """The modality of every key, -1 for special tokens and padding; needs ``tokens=True``."""
        blocks = self._site(site).blocks
        self._need_tokens()
        longest = max(b.labels.shape[-1] for b in blocks)  # type: ignore[union-attr]
        pad = torch.nn.functional.pad
        return torch.cat([pad(b.labels.cpu(), (0, longest - b.labels.shape[-1]), value=SPECIAL) for b in blocks])  # type: ignore[union-attr]

    def table(self) -> ShareTableView:
        """Site by modality, mean over samples and heads; prints as a table, and is a list of dicts."""
        if not self.complete:
            raise self.nothing()
        rows = []
        for site in self.sites:
            share = self.share(site).nanmean(dim=(0, 1))
            row = {"site": site, **dict(zip(self._sites[site].names, share.tolist(), strict=True))}
            row |= {"special": float(self.special(site).nanmean()), "sink": float(self.sink(site).nanmean())}
            rows.append(row)
        return ShareTableView(self.names, rows, self._missed)

    @property
    def complete(self) -> bool:
        """Whether anything was seen where modalities meet, if there was anything to see."""
        return bool(self._sites) and not (self._missed and all(site.tower for site in self._sites.values()))

    def nothing(self) -> ConfigError:
        """The error for a model whose attention stayed hidden."""
        if self._missed:
            site, reason = next(iter(self._missed.items()))
            more = f" ({len(self._missed) - 1} others alike)" if len(self._missed) > 1 else ""
            got = f"'{site}', but {reason}{more}"
            fix = "Give one label for every key: watch(model, modality=labels, names=('text', 'image'))."
        elif self.session is not None and not self.session.called and self.session.threads.elsewhere:
            got = f"none, since the model ran in another thread, '{self.session.threads.elsewhere}'"
            fix = "Open the block in the thread that runs the model, or start that thread in the block."
        elif self.session is not None and not self.session.called:
            got, fix = "none, since the model did not run while it was watched", "Call it inside of the with block."
        else:
            got = "none"
            fix = (
                "Seen are equipoise's layers, nn.MultiheadAttention, F.scaled_dot_product_attention, softmax over keys "
                "and Hugging Face's attention interface; a fused extension, or attention without softmax, hides it. "
                "Models that are none of these need modality=, one label for every key."
            )
        return ConfigError("watch", expected="attention whose keys have known modalities", got=got, fix=fix)

    def _site(self, name: str) -> LayerRecord:
        if not self._sites:
            raise self.nothing()
        if name in self._missed and name not in self._sites:
            raise ConfigError("Seen", expected="a site whose attention could be seen", got=f"'{name}', but "
                              f"{self._missed[name]}")  # fmt: skip
        if name not in self._sites:
            raise unknown_name("Seen", "site", name, (*self._sites, *self._missed))
        return self._sites[name]

    def _need_tokens(self) -> None:
        if not self._with_tokens:
            raise ConfigError(
                "Seen", expected="attention on single tokens", got="none, since it costs a pass of its own",
                fix="Ask for it: watch(model, tokens=True).",
            )  # fmt: skip

    def _without(self, site: str, place: LayerRecord, top: int) -> Tensor:
        tokens, labels = self.tokens(site).nan_to_num(0.0), self.labels(site)
        mean = tokens.mean(dim=1)
        worst = mean.topk(min(top, mean.shape[-1]), dim=-1).indices
        kept = tokens.scatter(2, worst[:, None].expand(-1, tokens.shape[1], -1), 0.0)
        hot = labels[..., None] == torch.arange(len(place.names))
        share = kept @ hot.to(kept.dtype)
        return share / kept.sum(dim=-1, keepdim=True)


def _joined(parts: list[Tensor]) -> Tensor:
    """Samples of all blocks, on the CPU; the first block decides the number of heads."""
    return torch.cat([part.float().cpu() for part in parts])


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"
