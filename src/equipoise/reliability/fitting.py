"""Measures training data and calibrates reliability on damaged validation data, for ``Reliability.fit``.

``reliable`` is the ``Reliability`` to fit, which imports this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.corruptions import InputKind
from ..diagnostics.prediction_collection import check_batch, to_device
from ..errors import ShapeError
from .calibration import conformal_threshold, fit_calibration
from .calibration_records import CalibrationRecords
from .damaged_validation import COPIES, InputMoments, damaged_batch
from .feature_statistics import input_features, token_features
from .masked_tokens import finite_tokens
from .training_distance import TrainingDistance, TrainingFeatures

Batches = Iterable[Mapping[str, Any]]


def measure_training(
    reliable: Any, train: Batches, device: torch.device, random: torch.Generator, prototypes: int
) -> InputMoments:  # fmt: skip
    """Fits the distances of the modalities, and returns statistics of the inputs and targets."""
    features = {name: TrainingFeatures(random, prototypes) for name in reliable.names}
    moments = InputMoments(reliable.names)
    for batch in train:
        batch = _checked(batch, device, "Reliability.fit train")
        moments.add(batch)
        if reliable.distance == "energy":
            continue
        tokens, present = finite_tokens(reliable.model.encode(batch), reliable.names)  # type: ignore[operator]
        masks = batch.get("mask") or {}
        for index, name in enumerate(reliable.names):
            if batch[name] is None:
                continue
            found = token_features(tokens[name])
            if reliable.distance == "input":
                found = input_features(batch[name], masks.get(name), f"Reliability '{name}'")
            features[name].add(found[present[:, index]])
    moments.check("Reliability.fit train")
    if reliable.distance != "energy":
        for name, part in features.items():
            distance: TrainingDistance = reliable.distances[name]  # type: ignore[assignment]
            distance.fit(part, covariance=reliable.distance == "mahalanobis", who=f"Reliability.fit train '{name}'")
    return moments


def calibrate(
    reliable: Any, val: Batches, device: torch.device, seed: int, moments: InputMoments,
    corruptions: Sequence[str], kinds: Mapping[str, InputKind],
) -> None:  # fmt: skip
    """Fits the constants on damaged validation data, and the conformal thresholds on clean validation data."""
    random = torch.Generator().manual_seed(seed)
    records = CalibrationRecords(torch.Generator().manual_seed(seed))
    clean: dict[str, list[Tensor]] = {name: [] for name in reliable.names}
    batches = 0
    for batch in val:
        batch = _checked(batch, device, "Reliability.fit val")
        batches += 1
        for copy in range(1 + COPIES):
            # The first copy is not damaged.
            damaged = damaged_batch(batch, reliable.names, moments, random, corruptions, kinds) if copy else batch
            tokens, present = finite_tokens(reliable.encode(damaged), reliable.names)
            evidence, outputs = reliable.evidence(tokens)
            if copy:
                logits = torch.stack([output.logits for output in outputs], dim=1)  # type: ignore[arg-type]
                records.add(evidence, logits, batch["target"], present)
                continue
            for index, name in enumerate(reliable.names):
                distance = evidence[:, index, 0]
                clean[name].append(distance[present[:, index] & distance.isfinite()].cpu())
    if not batches:
        raise ShapeError(
            "Reliability.fit val", expected="at least one batch", got="none",
            fix="Is the split empty, or the iterator used up?",
        )  # fmt: skip
    for name, count in zip(reliable.names, records.count(), strict=True):
        if not count:
            raise ShapeError(
                f"Reliability.fit val '{name}'", expected="validation samples with the modality and finite features",
                got="none", fix="Pass validation batches that contain every modality.",
            )  # fmt: skip
    found = fit_calibration(
        records, reliable.subsets.cpu(), reliable.task, moments.target() if reliable.task == "regression" else None
    )
    for buffer, value in (
        (reliable.intercept, found.intercept), (reliable.log_slope, found.log_slope), (reliable.center, found.center),
        (reliable.log_temperature, found.log_temperature), (reliable.log_agreement, found.log_agreement),
    ):  # fmt: skip
        buffer.copy_(value)
    if reliable.task == "regression":
        reliable.log_temperature.zero_()
    thresholds = [conformal_threshold(torch.cat(clean[name]).float(), reliable.alpha) for name in reliable.names]
    reliable.threshold.copy_(torch.tensor(thresholds))


def _checked(batch: Any, device: torch.device, who: str) -> dict[str, Any]:
    batch = {key: to_device(value, device) for key, value in check_batch(batch, who).items()}
    if not isinstance(batch.get("target"), Tensor):
        raise ShapeError(who, expected="a 'target' in every batch", got=", ".join(map(str, batch)) or "nothing")
    return batch
