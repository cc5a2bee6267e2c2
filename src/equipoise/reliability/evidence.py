"""Evidence on the modalities of a sample: distance to the training data, and uncertainty of unimodal predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..tokens.masks import at_least_float32
from ..tokens.token_batch import Output, Tokens
from .feature_statistics import input_features, token_features


@dataclass(frozen=True, eq=False)
class MeasuredTokens(Tokens):
    """Tokens with the log distance (batch,) of the raw input from which they were encoded."""

    log_distance: Tensor | None = None


def measure_inputs(
    tokens: Mapping[str, Tokens], batch: Mapping[str, Any], distances: nn.ModuleDict, who: str
) -> dict[str, Tokens]:  # fmt: skip
    """Adds the log distance of the raw inputs to the tokens of the modalities that a batch has."""
    result, masks = dict(tokens), batch.get("mask") or {}
    for name, part in tokens.items():
        if batch[name] is not None:
            distance = distances[name](input_features(batch[name], masks.get(name), f"{who} '{name}'"))
            fields = {key: getattr(part, key) for key in Tokens.__dataclass_fields__}
            result[name] = MeasuredTokens(**fields, log_distance=distance)
    return result


def log_distances(
    tokens: Mapping[str, Tokens], distances: nn.ModuleDict, kind: str, task: str, output: Output | None,
    singles: Mapping[str, Tensor],
) -> Float[Tensor, "batch modality"]:  # fmt: skip
    """Returns the log distance of each modality, or its energy in place of that.

    Args:
        tokens: encoded modalities, in the order of the result.
        distances: modality -> TrainingDistance.
        kind: name of the distance.
        task: of the model.
        output: of the fusion of all modalities, whose unimodal logits have an energy.
        singles: logits of the model with one modality alone, used where ``output`` has no unimodal logits.
    """
    found = []
    for name, part in tokens.items():
        if kind == "energy":
            heads = {} if output is None else output.unimodal_logits
            found.append(_energy(heads.get(name, singles.get(name)), task))  # type: ignore[arg-type]
        elif isinstance(part, MeasuredTokens) and part.log_distance is not None:
            found.append(part.log_distance)
        elif kind == "input":
            # The modality is missing from the batch.
            found.append(at_least_float32(part.values).new_full((len(part.values),), torch.inf))
        else:
            found.append(distances[name](token_features(part)))
    return torch.stack(found, dim=1)


def prediction_entropy(logits: Float[Tensor, "batch ... output"], task: str) -> Float[Tensor, "batch ..."]:
    """Returns the entropy of predictions in nats; of several labels, the mean over labels.

    Example:
        >>> prediction_entropy(torch.tensor([[0.0, 0.0]]), "classification")
        tensor([0.6931])
    """
    logits = at_least_float32(logits)
    if task == "classification":
        log_p = logits.log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1)
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    return -(yes.exp() * yes + no.exp() * no).mean(dim=-1)


def _energy(logits: Tensor, task: str) -> Float[Tensor, " batch"]:
    """Free energy of predictions; infinite where they are not finite."""
    logits = at_least_float32(logits)
    energy = -logits.logsumexp(dim=1) if task == "classification" else -F.softplus(logits).sum(dim=1)
    return energy.masked_fill(~logits.isfinite().all(dim=1), torch.inf)
