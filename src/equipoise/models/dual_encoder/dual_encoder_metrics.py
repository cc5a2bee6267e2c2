"""How good a shared space is: finding both ways, meanings that add up, and how its modalities lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...alignment import (  # fmt: skip
    Retrieval,
    additive_compositionality,
    alignment,
    found_within,
    linear_cka,
    modality_gap,
    retrieval,
    same_ids,
    similarities,
    uniformity,
)

BATCH = 256
RANKS = (1, 5)

Vectors = Mapping[str, Float[Tensor, "sample dim"]]


class EmbeddingEvaluator(Protocol):
    """What is judged: it brings batches to unit vectors."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the modalities."""
        ...

    def embed(self, batch: Mapping[str, Tensor]) -> Vectors:
        """name -> (batch, dim) of every modality that the batch has."""
        ...

    def parameters(self) -> Iterator[Tensor]:
        """Of the module, which tell where it stands."""
        ...


def evaluate_dual_encoder(space: EmbeddingEvaluator, source: Any, split: str) -> dict[str, float]:
    """Figures of a model in evaluation mode.

    * ``<a>_to_<b>/recall@1``, ``recall@5``, ``median_rank``, ``mrr``: samples of the split as seen by a find what b has
      of them among the split's samples; ``chance/...`` is what guessing gets.
    * ``recall@1``, ``recall@5``, ``median_rank``: the mean over these directions.
    * ``<a>_to_<b>_among_all/...``: the same among the samples of all splits, those of the training too.
    * ``recall@1/<group>``: of data that have ``groups``, see ``by_group``.
    * ``composed_to_<b>/recall@1`` and ``compositionality/<b>``: of data that have ``combinations``, see ``composed``.
    * ``modality_gap``, ``alignment``, ``uniformity``, ``cka``: see `equipoise.alignment`.
    """
    vectors, target = embed_split(space, source, split)
    found = retrieval_metrics(vectors, target) | embedding_metrics(vectors)
    parts = [embed_split(space, source, other) for other in ("train", "val", "test") if other != split]
    everything = {name: torch.cat([own, *(part[0][name] for part in parts)]) for name, own in vectors.items()}
    found |= full_gallery_metrics(vectors, target, everything, torch.cat([target, *(part[1] for part in parts)]))
    if hasattr(source, "groups"):
        found |= retrieval_by_group(vectors, target, source.groups(split))
    if hasattr(source, "combinations"):
        found |= composition_metrics(space, source, split, vectors)
    return found


def embed_split(space: EmbeddingEvaluator, source: Any, split: str) -> tuple[dict[str, Tensor], Int[Tensor, " sample"]]:
    """name -> (sample, dim) of a whole split, on the CPU, and the targets."""
    place = next(space.parameters()).device
    made: dict[str, list[Tensor]] = {name: [] for name in space.names}
    for batch in source.batches(split, BATCH, seed=0, epoch=0, train=False):
        for name, vectors in space.embed({name: batch[name].to(place) for name in space.names}).items():
            made[name].append(vectors.detach().float().cpu())
    return {name: torch.cat(parts) for name, parts in made.items()}, source.split(split).target


def retrieval_metrics(vectors: Vectors, target: Int[Tensor, " sample"]) -> dict[str, float]:
    """Every modality finds every other one; samples that lack one of the two are left out of their pair.

    Example:
        >>> found = finding({"image": torch.eye(3), "text": torch.eye(3)}, torch.arange(3))
        >>> found["image_to_text/recall@1"], round(found["chance/recall@1"], 3)
        (1.0, 0.333)
    """
    figures: dict[str, float] = {}
    ways: list[Retrieval] = []
    for one, other in combinations(vectors, 2):
        both = vectors[one].any(dim=1) & vectors[other].any(dim=1)
        if not bool(both.any()):
            continue
        relevant = same_ids(target[both], target[both])
        there, back = retrieval(similarities(vectors[one][both], vectors[other][both]), relevant=relevant, k=RANKS)
        figures |= _said(f"{one}_to_{other}", there) | _said(f"{other}_to_{one}", back)
        ways += [there, back]
    if not ways:
        return {}
    mean = {f"recall@{k}": sum(way.recall[k] for way in ways) / len(ways) for k in RANKS}
    chance = {f"chance/recall@{k}": sum(way.chance[k] for way in ways) / len(ways) for k in RANKS}
    return {**mean, "median_rank": sum(way.median_rank for way in ways) / len(ways), **figures, **chance}


def retrieval_by_group(vectors: Vectors, target: Int[Tensor, " sample"], groups: Sequence[str]) -> dict[str, float]:
    """``recall@1/<group>``: the mean over directions of what samples of one group find among all of the split.

    Example:
        >>> by_group({"image": torch.eye(2), "text": torch.eye(2)}, torch.arange(2), ["hearts", "clocks"])
        {'recall@1/clocks': 1.0, 'recall@1/hearts': 1.0}
    """
    solved: dict[str, list[float]] = {group: [] for group in sorted(set(groups))}
    for one, other in permutations(vectors, 2):
        both = vectors[one].any(dim=1) & vectors[other].any(dim=1)
        if not bool(both.any()):
            continue
        own = target[both]
        found = found_within(similarities(vectors[one][both], vectors[other][both]), 1, relevant=same_ids(own, own))
        names = [group for group, there in zip(groups, both.tolist(), strict=True) if there]
        for group, right in zip(names, found.tolist(), strict=True):
            solved[group].append(right)
    return {f"recall@1/{group}": sum(rows) / len(rows) for group, rows in solved.items() if rows}


def full_gallery_metrics(
    vectors: Vectors, target: Int[Tensor, " sample"], everything: Vectors, meaning: Int[Tensor, " item"]
) -> dict[str, float]:
    """The same among more items than those that ask."""
    figures: dict[str, float] = {}
    for one in vectors:
        for other in vectors:
            asks, there = vectors[one].any(dim=1), everything[other].any(dim=1)
            relevant = same_ids(target[asks], meaning[there])
            if one == other or not bool(relevant.any()):
                continue
            found, _ = retrieval(similarities(vectors[one][asks], everything[other][there]), relevant=relevant, k=RANKS)
            figures |= _said(f"{one}_to_{other}_among_all", found)
    return figures


def embedding_metrics(vectors: Vectors) -> dict[str, float]:
    """How the modalities lie to each other, and how evenly each fills the sphere."""
    figures = {}
    for name, own in vectors.items():
        here = own[own.any(dim=1)]
        if len(here) > 1:
            figures[f"uniformity/{name}"] = float(uniformity(here))
    for one, other in combinations(vectors, 2):
        both = vectors[one].any(dim=1) & vectors[other].any(dim=1)
        if int(both.sum()) > 1:
            a, b = vectors[one][both], vectors[other][both]
            measures = {"modality_gap": modality_gap, "alignment": alignment, "cka": linear_cka}
            figures |= {f"{kind}/{one}-{other}": float(measure(a, b)) for kind, measure in measures.items()}
    return figures


def composition_metrics(space: EmbeddingEvaluator, source: Any, split: str, vectors: Vectors) -> dict[str, float]:
    """Does "red" plus "heart" find the red heart? The sum of the parts' vectors, among all combinations of the split.

    ``composed_to_<b>/recall@1``: combinations whose own b is the nearest; ``compositionality/<b>``: the cosine with
    their own b less the mean of those with the others'.
    """
    rows, modality, parts, present = source.combinations(split)
    if len(rows) < 2:
        return {}
    place = next(space.parameters()).device
    flat = space.embed({modality: parts[present].to(place)})[modality].detach().float().cpu()
    apart = torch.zeros(*present.shape, flat.shape[-1])
    apart[present] = flat
    target = source.split(split).target[rows]
    figures: dict[str, float] = {}
    for name, own in vectors.items():
        if name != modality:
            added = torch.nn.functional.normalize(apart.sum(dim=1), dim=-1)
            there, _ = retrieval(similarities(added, own[rows]), relevant=same_ids(target, target), k=RANKS)
            figures |= _said(f"composed_to_{name}", there)
            figures |= {f"chance/composed_to_{name}/recall@{k}": there.chance[k] for k in RANKS}
            figures[f"compositionality/{name}"] = float(additive_compositionality(apart, own[rows]).mean())
    return figures


def _said(way: str, found: Retrieval) -> dict[str, float]:
    recalls = {f"{way}/recall@{k}": value for k, value in found.recall.items()}
    return {**recalls, f"{way}/median_rank": found.median_rank, f"{way}/mrr": found.mean_reciprocal_rank}
