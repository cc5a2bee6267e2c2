"""Records attention maps between the tokens of different modalities during forward passes."""

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
"""(modality of the queries, modality of the keys) -> (token, token) map of one sample with rows that sum to 1."""

CLASS_ALONE = "all queries are special tokens such as a class token"
OWN_ALONE = "tokens attend only to their own modality and to special tokens"
UNKNOWN = "the modality of the queries is unknown"
OTHER_TOKENS = "the keys are not the same tokens as the queries"
NOT_ALL = "no sample has maps between all modalities"
REASONS = (NOT_ALL, OTHER_TOKENS, OWN_ALONE, UNKNOWN, CLASS_ALONE)
"""In order of priority."""


class TokenMaps(NamedTuple):
    """Supermatrix of one sample, on the CPU in double precision, and the number of tokens of each modality."""

    matrix: Float[Tensor, "size size"]
    sizes: tuple[int, ...]


class MapReader:
    """Attention handler that stores the maps of the first samples.

    Args:
        samples: maximum number of samples.

    Attributes:
        names: of the modalities, after the first attention call.
        reasons: layer -> reason why it has no map.
    """

    replaces_output = False

    def __init__(self, samples: int) -> None:
        self.names: tuple[str, ...] = ()
        self.reasons: dict[str, str] = {}
        self._sites: dict[str, dict[int, Blocks]] = {}
        self._samples, self._done = samples, 0

    def enough(self, loader: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yields batches until there are enough samples."""
        for batch in loader:
            yield batch
            if self._done >= self._samples:
                return

    def left(self, batch: int) -> int:
        """Number of samples of a batch that are still needed."""
        return min(batch, self._samples - self._done)

    def passed(self, batch: int) -> None:
        """Called after the forward pass of a batch."""
        self._done += batch

    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        if known.unimodal:
            return None
        self.names = self.names or known.names
        if known.queries is None:
            return self.on_missing(layer, UNKNOWN)
        few = _few(call, self.left(call.sizes[0]))
        queries, keys = _labels(few, known)
        if not bool((queries != SPECIAL).any()):
            return self.on_missing(layer, CLASS_ALONE)
        attention = torch.cat([part.double() for part in explicit_attention(few)], dim=2).mean(dim=1).cpu()
        samples = self._sites.setdefault(layer, {})
        for number in range(len(attention)):
            samples[self._done + number] = blocks_of(attention[number], queries[number], keys[number])
        if not any(samples.values()):
            self.on_missing(layer, OWN_ALONE)

    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def on_missing(self, layer: str, reason: str) -> None:
        self.reasons.setdefault(layer, reason)

    def nothing(self) -> str:
        """The reason why there is no layer with maps."""
        for reason in REASONS:
            for site, why in self.reasons.items():
                if why == reason:
                    return f"none: in '{site}' {why}"
        return "no attention over tokens of known modalities"

    def layers(self) -> dict[str, list[TokenMaps]]:
        """Returns layer -> supermatrix (not symmetric) of each sample with all modalities.

        If each modality has its own layer that attends to the others, the layers at the same depth are combined, and
        "*" replaces the parts in which their names differ.
        """
        maps = {}
        for sites in self._together():
            samples: dict[int, Blocks] = {}
            for site in sites:
                for number, blocks in self._sites[site].items():
                    samples.setdefault(number, {}).update(blocks)
            complete = [blocks for blocks in samples.values() if len(blocks) == len(self.names) * (len(self.names) - 1)]
            fitting = [_mapped(blocks) for blocks in complete if _fit(blocks)]
            if fitting and len(self.names) > 1:
                maps[_common(sites)] = fitting
            else:
                self.on_missing(sites[0], OTHER_TOKENS if complete else NOT_ALL)
        return maps

    def _together(self) -> list[list[str]]:
        """Groups of modules that form one layer."""
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
    """Splits attention into maps between modalities, with rows normalized to 1.

    A token without attention to another modality has a row of zeros there.
    """
    blocks = {}
    for reader in queries[queries != SPECIAL].unique().tolist():
        rows = attention[queries == reader]
        for read in keys[keys != SPECIAL].unique().tolist():
            if read != reader:
                part = rows[:, keys == read]
                total = part.sum(dim=-1, keepdim=True)
                blocks[reader, read] = part / total.masked_fill(total == 0, 1.0)
    return blocks


def token_maps(tokens: Mapping[str, Tokens], take: int, temperature: float) -> list[TokenMaps]:
    """Supermatrices of the first samples with all modalities, from the cosines of their tokens."""
    maps = []
    for number in range(take):
        parts = [part.values[number][part.valid()[number]].double().cpu() for part in tokens.values()]
        if len(parts) > 1 and all(len(part) for part in parts):
            units = [torch.nn.functional.normalize(part, dim=-1) for part in parts]
            matrix = supermatrix_from_tokens(units, temperature=temperature, symmetrize=False)
            maps.append(TokenMaps(matrix, tuple(len(part) for part in parts)))
    return maps


def _mapped(blocks: Blocks) -> TokenMaps:
    sizes = {reader: part.shape[0] for (reader, _), part in blocks.items()}
    return TokenMaps(supermatrix(blocks), tuple(sizes[modality] for modality in sorted(sizes)))


def _few(call: AttentionCall, take: int) -> AttentionCall:
    """The first samples of a call, in double precision, so that small attention values can be normalized."""
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
    """Labels of the first samples, on the CPU."""
    return (labels[:batch] if labels.ndim == 2 else labels).cpu().expand(batch, tokens)


def _fit(blocks: Blocks) -> bool:
    """Whether all maps of a modality have the same number of its tokens."""
    sizes = {(modality, size) for pair, part in blocks.items() for modality, size in zip(pair, part.shape, strict=True)}
    return len(sizes) == len({modality for modality, _ in sizes})


def _common(sites: list[str]) -> str:
    """Combines several module names, with "*" where they differ.

    Example:
        >>> _common(["blocks.audio.0", "blocks.image.0"])
        'blocks.*.0'
    """
    parts = [site.split(".") for site in sites]
    if len({len(part) for part in parts}) > 1:
        return " and ".join(sites)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*parts, strict=True))
