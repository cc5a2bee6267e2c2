"""Maps between modalities, out of the attention of a model that runs: who of one goes to whom of another (spec 6.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..consistency import supermatrix, supermatrix_from_tokens
from ..recording import AttentionCall, LabeledKeys
from ..recording.share_measurement import explicit_attention
from ..tokens.token_batch import SPECIAL, Tokens

Blocks = dict[tuple[int, int], Tensor]
"""(modality that reads, modality that is read) -> (token, token) map of one sample, whose rows sum to 1."""

CLASS_ALONE = "no token of a modality reads, only special ones such as a class token"
OWN_ALONE = "tokens read their own modality and special ones alone"
UNKNOWN = "nothing tells the modality of those who read"
OTHER_TOKENS = "the tokens that are read are not those that read"
NOT_ALL = "no sample has a map from every modality to every other"
REASONS = (NOT_ALL, OTHER_TOKENS, OWN_ALONE, UNKNOWN, CLASS_ALONE)
"""The one that says most first."""


class TokenMaps(NamedTuple):
    """One sample's supermatrix, on the CPU in double precision, and how many tokens each modality has."""

    matrix: Float[Tensor, "size size"]
    sizes: tuple[int, ...]


class MapReader:
    """What ``opened`` shows every attention to; it keeps the maps of the first samples.

    Args:
        samples: how many.

    Attributes:
        names: of the modalities, once an attention was seen.
        reasons: site -> why there is no map.
    """

    replaces_output = False

    def __init__(self, samples: int) -> None:
        self.names: tuple[str, ...] = ()
        self.reasons: dict[str, str] = {}
        self._sites: dict[str, dict[int, Blocks]] = {}
        self._samples, self._done = samples, 0

    def enough(self, loader: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Batches, until there are enough samples."""
        for batch in loader:
            yield batch
            if self._done >= self._samples:
                return

    def left(self, batch: int) -> int:
        """How many samples of this batch count."""
        return min(batch, self._samples - self._done)

    def passed(self, batch: int) -> None:
        """A batch has gone through the whole model."""
        self._done += batch

    def on_attention(self, site: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        if known.unimodal:
            return None
        self.names = self.names or known.names
        if known.queries is None:
            return self.on_missing(site, UNKNOWN)
        few = _few(call, self.left(call.sizes[0]))
        queries, keys = _labels(few, known)
        if not bool((queries != SPECIAL).any()):
            return self.on_missing(site, CLASS_ALONE)
        attention = torch.cat([part.double() for part in explicit_attention(few)], dim=2).mean(dim=1).cpu()
        kept = self._sites.setdefault(site, {})
        for number in range(len(attention)):
            kept[self._done + number] = blocks_of(attention[number], queries[number], keys[number])
        if not any(kept.values()):
            self.on_missing(site, OWN_ALONE)

    def replace_output(self, site: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def on_missing(self, site: str, reason: str) -> None:
        self.reasons.setdefault(site, reason)

    def nothing(self) -> str:
        """Why there is no layer: of what was seen rather than of what stayed hidden."""
        for reason in REASONS:
            for site, why in self.reasons.items():
                if why == reason:
                    return f"none: in '{site}' {why}"
        return "no attention over tokens of known modalities"

    def layers(self) -> dict[str, list[TokenMaps]]:
        """Layer -> the supermatrix, not symmetric, of every sample that has all modalities.

        Where each modality has a layer of its own that reads the others, those that come equally early are one, and
        "*" stands for what their names do not share.
        """
        found = {}
        for sites in self._together():
            samples: dict[int, Blocks] = {}
            for site in sites:
                for number, blocks in self._sites[site].items():
                    samples.setdefault(number, {}).update(blocks)
            whole = [blocks for blocks in samples.values() if len(blocks) == len(self.names) * (len(self.names) - 1)]
            fitting = [_mapped(blocks) for blocks in whole if _fit(blocks)]
            if fitting and len(self.names) > 1:
                found[_common(sites)] = fitting
            else:
                self.on_missing(sites[0], OTHER_TOKENS if whole else NOT_ALL)
        return found

    def _together(self) -> list[list[str]]:
        """Sites that make up one layer."""
        earlier: Counter[frozenset[int]] = Counter()
        groups: dict[str | int, list[str]] = {}
        for site, samples in self._sites.items():
            readers = frozenset(reader for blocks in samples.values() for reader, _ in blocks)
            if len(readers) == len(self.names):
                groups[site] = [site]
            elif readers:
                groups.setdefault(earlier[readers], []).append(site)
                earlier[readers] += 1
        return list(groups.values())


def blocks_of(
    attention: Float[Tensor, "query key"], queries: Int[Tensor, " query"], keys: Int[Tensor, " key"]
) -> Blocks:
    """Attention cut into maps: what the tokens of one modality give to each of another's, as parts of 1.

    A token that gives another modality nothing at all maps to nothing there.
    """
    found = {}
    for reader in queries[queries != SPECIAL].unique().tolist():
        rows = attention[queries == reader]
        for read in keys[keys != SPECIAL].unique().tolist():
            if read != reader:
                part = rows[:, keys == read]
                total = part.sum(dim=-1, keepdim=True)
                found[reader, read] = part / total.masked_fill(total == 0, 1.0)
    return found


def token_maps(tokens: Mapping[str, Tokens], take: int, temperature: float) -> list[TokenMaps]:
    """The supermatrix of each of the first samples that has all modalities, by the cosines of its tokens."""
    found = []
    for number in range(take):
        parts = [part.values[number][part.valid()[number]].double().cpu() for part in tokens.values()]
        if len(parts) > 1 and all(len(part) for part in parts):
            units = [torch.nn.functional.normalize(part, dim=-1) for part in parts]
            matrix = supermatrix_from_tokens(units, temperature=temperature, symmetrize=False)
            found.append(TokenMaps(matrix, tuple(len(part) for part in parts)))
    return found


def _mapped(blocks: Blocks) -> TokenMaps:
    sizes = {reader: part.shape[0] for (reader, _), part in blocks.items()}
    return TokenMaps(supermatrix(blocks), tuple(sizes[modality] for modality in sorted(sizes)))


def _few(call: AttentionCall, take: int) -> AttentionCall:
    """The first samples of a call, in double precision, so that what is hardly looked at is divided exactly too."""
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[:take]
    attention = None if call.attention is None else call.attention[:take]
    query, key = (part[:take].double() for part in (call.query, call.key))
    return replace(call, query=query, key=key, value=call.value[:take], mask=mask, attention=attention)


def _labels(call: AttentionCall, known: LabeledKeys) -> tuple[Tensor, Tensor]:
    """(sample, query) and (sample, key) labels, -1 for padding."""
    batch, _, rows, total = call.sizes
    queries, keys = _each(known.queries, batch, rows), _each(known.keys, batch, total)  # type: ignore[arg-type]
    if (read := call.visible_keys()) is not None:
        keys = keys.masked_fill(~read.cpu(), SPECIAL)
    if known.valid is not None:
        queries = queries.masked_fill(~known.valid[:batch].cpu(), SPECIAL)
    return queries, keys


def _each(labels: Int[Tensor, "... token"], batch: int, tokens: int) -> Int[Tensor, "batch token"]:
    """Labels of each of the first samples, on the CPU."""
    return (labels[:batch] if labels.ndim == 2 else labels).cpu().expand(batch, tokens)


def _fit(blocks: Blocks) -> bool:
    """Whether all maps of a modality have as many tokens of it."""
    sizes = {(modality, size) for pair, part in blocks.items() for modality, size in zip(pair, part.shape, strict=True)}
    return len(sizes) == len({modality for modality, _ in sizes})


def _common(sites: list[str]) -> str:
    """One name for several, "*" where they differ.

    Example:
        >>> _common(["blocks.audio.0", "blocks.image.0"])
        'blocks.*.0'
    """
    parts = [site.split(".") for site in sites]
    if len({len(part) for part in parts}) > 1:
        return " and ".join(sites)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*parts, strict=True))
