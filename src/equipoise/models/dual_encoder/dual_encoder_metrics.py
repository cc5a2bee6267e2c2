"""Metrics of dual encoders: retrieval in both directions, compositionality, and geometry of the embeddings."""

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
MOST = 4_000
"""Samples of a split that are compared with each other; equally spaced ones of larger splits."""
RANKS = (1, 5)

Vectors = Mapping[str, Float[Tensor, "sample dim"]]


class Embedder(Protocol):
    """Interface of evaluated models: maps batches to unit vectors."""

    @property
    def names(self) -> tuple[str, ...]:
        """Modality names."""
        ...

    def embed(self, batch: Mapping[str, Any]) -> Vectors:
        """Embeds a batch: name -> (batch, dim) for every modality in the batch."""
        ...

    def parameters(self) -> Iterator[Tensor]:
        """The module's parameters (used to find its device)."""
        ...


def evaluate_dual_encoder(model: Embedder, source: Any, split: str) -> dict[str, float]:
    """Computes all metrics of a model in evaluation mode.

    * ``<a>_to_<b>/recall@1``, ``recall@5``, ``median_rank``, ``mrr``: retrieval of modality b from modality a among the
      samples of the split; ``chance/...`` is the expected value of random guessing.
    * ``recall@1``, ``recall@5``, ``median_rank``: mean over all directions.
    * ``<a>_to_<b>_among_all/...``: retrieval among the samples of all splits, including training; not for data sets
      with more than ``MOST``^2 pairs of a query and a sample.
    * ``recall@1/<group>``: for data sets with ``groups``, see ``retrieval_by_group``.
    * ``composed_to_<b>/recall@1`` and ``compositionality/<b>``: for data sets with ``combinations``, see
      ``composition_metrics``.
    * ``modality_gap``, ``alignment``, ``uniformity``, ``cka``: see `equipoise.alignment`.
    """
    vectors, target = embed_split(model, source, split)
    if len(target) > MOST:
        indices = torch.linspace(0, len(target) - 1, MOST).long()
        vectors, target = {name: values[indices] for name, values in vectors.items()}, target[indices]
    metrics = retrieval_metrics(vectors, target) | embedding_metrics(vectors)
    others = [other for other in ("train", "val", "test") if other != split]
    if len(target) * (len(target) + sum(len(source.split(other).target) for other in others)) <= MOST**2:
        parts = [embed_split(model, source, other) for other in others]
        gallery = {name: torch.cat([values, *(part[0][name] for part in parts)]) for name, values in vectors.items()}
        metrics |= full_gallery_metrics(vectors, target, gallery, torch.cat([target, *(part[1] for part in parts)]))
    if hasattr(source, "groups"):
        metrics |= retrieval_by_group(vectors, target, source.groups(split))
    if hasattr(source, "combinations"):
        metrics |= composition_metrics(model, source, split, vectors)
    return metrics


def embed_split(model: Embedder, source: Any, split: str) -> tuple[dict[str, Tensor], Int[Tensor, " sample"]]:
    """Embeds a split; returns name -> (sample, dim) on the CPU, and the targets."""
    device = next(model.parameters()).device
    embeddings: dict[str, list[Tensor]] = {name: [] for name in model.names}
    for batch in source.batches(split, BATCH, seed=0, epoch=0, train=False):
        for name, vectors in model.embed(_inputs(batch, model.names, device)).items():
            embeddings[name].append(vectors.detach().float().cpu())
    return {name: torch.cat(parts) for name, parts in embeddings.items()}, source.split(split).target


def _inputs(batch: Mapping[str, Any], names: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Returns the inputs of a batch with their masks and times, on a device."""
    inputs: dict[str, Any] = {name: batch[name].to(device) for name in names}
    for key in ("mask", "times"):
        if key in batch:
            inputs[key] = {name: values.to(device) for name, values in batch[key].items() if name in names}
    return inputs


def retrieval_metrics(vectors: Vectors, target: Int[Tensor, " sample"]) -> dict[str, float]:
    """Retrieval metrics between all pairs of modalities; samples that lack one of a pair are skipped for that pair.

    Example:
        >>> metrics = retrieval_metrics({"image": torch.eye(3), "text": torch.eye(3)}, torch.arange(3))
        >>> metrics["image_to_text/recall@1"], round(metrics["chance/recall@1"], 3)
        (1.0, 0.333)
    """
    metrics: dict[str, float] = {}
    results: list[Retrieval] = []
    for one, other in combinations(vectors, 2):
        both = vectors[one].any(dim=1) & vectors[other].any(dim=1)
        if not bool(both.any()):
            continue
        relevant = same_ids(target[both], target[both])
        forward, backward = retrieval(
            similarities(vectors[one][both], vectors[other][both]), relevant=relevant, k=RANKS
        )
        metrics |= _direction_metrics(f"{one}_to_{other}", forward) | _direction_metrics(f"{other}_to_{one}", backward)
        results += [forward, backward]
    if not results:
        return {}
    count = len(results)
    mean = {f"recall@{k}": sum(result.recall[k] for result in results) / count for k in RANKS}
    chance = {f"chance/recall@{k}": sum(result.chance[k] for result in results) / count for k in RANKS}
    return {**mean, "median_rank": sum(result.median_rank for result in results) / count, **metrics, **chance}


def retrieval_by_group(vectors: Vectors, target: Int[Tensor, " sample"], groups: Sequence[str]) -> dict[str, float]:
    """``recall@1/<group>``: recall@1 of the queries of each group among all samples, mean over directions.

    Example:
        >>> retrieval_by_group({"image": torch.eye(2), "text": torch.eye(2)}, torch.arange(2), ["hearts", "clocks"])
        {'recall@1/clocks': 1.0, 'recall@1/hearts': 1.0}
    """
    recalls: dict[str, list[float]] = {group: [] for group in sorted(set(groups))}
    for one, other in permutations(vectors, 2):
        both = vectors[one].any(dim=1) & vectors[other].any(dim=1)
        if not bool(both.any()):
            continue
        group_target = target[both]
        recall = found_within(
            similarities(vectors[one][both], vectors[other][both]), 1, relevant=same_ids(group_target, group_target)
        )
        present_groups = [group for group, present in zip(groups, both.tolist(), strict=True) if present]
        for group, value in zip(present_groups, recall.tolist(), strict=True):
            recalls[group].append(value)
    return {f"recall@1/{group}": sum(values) / len(values) for group, values in recalls.items() if values}


def full_gallery_metrics(
    vectors: Vectors, target: Int[Tensor, " sample"], gallery: Vectors, gallery_target: Int[Tensor, " item"]
) -> dict[str, float]:
    """Retrieval metrics against a larger gallery (all splits)."""
    metrics: dict[str, float] = {}
    for one in vectors:
        for other in vectors:
            queries, items = vectors[one].any(dim=1), gallery[other].any(dim=1)
            relevant = same_ids(target[queries], gallery_target[items])
            if one == other or not bool(relevant.any()):
                continue
            result, _ = retrieval(
                similarities(vectors[one][queries], gallery[other][items]), relevant=relevant, k=RANKS
            )  # fmt: skip
            metrics |= _direction_metrics(f"{one}_to_{other}_among_all", result)
    return metrics


def embedding_metrics(vectors: Vectors) -> dict[str, float]:
    """Modality gap, alignment and CKA of each pair of modalities, and uniformity of each modality."""
    figures = {}
    for name, values in vectors.items():
        present = values[values.any(dim=1)]
        if len(present) > 1:
            figures[f"uniformity/{name}"] = float(uniformity(present))
    for one, other in combinations(vectors, 2):
        both = vectors[one].any(dim=1) & vectors[other].any(dim=1)
        if int(both.sum()) > 1:
            a, b = vectors[one][both], vectors[other][both]
            measures = {"modality_gap": modality_gap, "alignment": alignment, "cka": linear_cka}
            figures |= {f"{kind}/{one}-{other}": float(measure(a, b)) for kind, measure in measures.items()}
    return figures


def composition_metrics(model: Embedder, source: Any, split: str, vectors: Vectors) -> dict[str, float]:
    """Compositionality: retrieval with the sum of the parts' vectors ("red" + "heart") among all combinations.

    ``composed_to_<b>/recall@1``: fraction of combinations whose matching item of modality b is the nearest;
    ``compositionality/<b>``: cosine with the matching item minus the mean cosine with the other items.
    """
    rows, modality, parts, present = source.combinations(split)
    if len(rows) < 2:
        return {}
    device = next(model.parameters()).device
    flat = model.embed({modality: parts[present].to(device)})[modality].detach().float().cpu()
    part_vectors = torch.zeros(*present.shape, flat.shape[-1])
    part_vectors[present] = flat
    target = source.split(split).target[rows]
    metrics: dict[str, float] = {}
    for name, values in vectors.items():
        if name != modality:
            queries = torch.nn.functional.normalize(part_vectors.sum(dim=1), dim=-1)
            result, _ = retrieval(similarities(queries, values[rows]), relevant=same_ids(target, target), k=RANKS)
            metrics |= _direction_metrics(f"composed_to_{name}", result)
            metrics |= {f"chance/composed_to_{name}/recall@{k}": result.chance[k] for k in RANKS}
            metrics[f"compositionality/{name}"] = float(additive_compositionality(part_vectors, values[rows]).mean())
    return metrics


def _direction_metrics(direction: str, result: Retrieval) -> dict[str, float]:
    recalls = {f"{direction}/recall@{k}": value for k, value in result.recall.items()}
    return {
        **recalls, f"{direction}/median_rank": result.median_rank, f"{direction}/mrr": result.mean_reciprocal_rank,
    }  # fmt: skip
