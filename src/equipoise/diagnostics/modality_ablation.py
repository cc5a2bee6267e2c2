"""Predictions without some of the modalities; the encoders run once and the fusion once for each subset."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..fusion.subset_tokens import keep_modalities
from ..tokens.token_batch import Output, Tokens
from .prediction_collection import CollectedPredictions, collect_predictions

Semantics = Literal["mask", "zero"]


class FusedLogits(Protocol):
    """Interface of the models that can be ablated; ``FusionModel`` implements it."""

    names: tuple[str, ...]
    encoders: nn.ModuleDict
    task: str

    def encode(self, batch: Any) -> dict[str, Tokens]: ...
    def fuse(self, tokens: Mapping[str, Tokens]) -> Output: ...
    def loss(self, logits: Tensor, target: Tensor) -> Tensor: ...


def remove_modality(tokens: Mapping[str, Tokens], names: Collection[str]) -> dict[str, Tokens]:
    """Removes the tokens of some modalities, as in a batch that lacks them."""
    return keep_modalities(tokens, [name for name in tokens if name not in names])


def zero_modality(tokens: Mapping[str, Tokens], names: Collection[str]) -> dict[str, Tokens]:
    """Replaces the tokens of some modalities by zeros that remain valid tokens.

    Example:
        >>> zero_modality({"audio": Tokens(torch.ones(2, 3, 1))}, ["audio"])["audio"].pooled().tolist()
        [[0.0], [0.0]]
    """
    return {
        name: replace(part, values=torch.zeros_like(part.values)) if name in names else part
        for name, part in tokens.items()
    }


Ablation = Callable[[Mapping[str, Tokens], Collection[str]], dict[str, Tokens]]
ABLATIONS: dict[str, Ablation] = {"mask": remove_modality, "zero": zero_modality}
"""Semantics -> function that removes modalities."""


def ablated_logits(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    without: Sequence[Collection[str]],
    *,
    semantics: Semantics = "mask",
) -> CollectedPredictions:
    """Collects logits (sample, subset, output) of a FusionModel without each subset of modalities.

    The encoders run once for each batch.
    """
    return collect_predictions(_Ablated(model, [(ABLATIONS[semantics], names) for names in without]), loader)


def record_fusion(model: nn.Module, who: str) -> FusedLogits:
    """Returns the model if it has the interface of a FusionModel.

    Raises:
        ConfigError: it does not.
    """
    lacking = [part for part in ("names", "encoders", "encode", "fuse", "loss", "task") if not hasattr(model, part)]
    if lacking:
        raise ConfigError(
            who,
            expected="a FusionModel, or a module with names, encoders, encode, fuse, loss and task",
            got=f"{type(model).__name__} without {', '.join(lacking)}",
        )
    return model  # type: ignore[return-value]


class _Ablated(nn.Module):
    """Encodes a batch once and fuses it once for each ablation."""

    def __init__(self, model: nn.Module, ablations: Sequence[tuple[Ablation, Collection[str]]]) -> None:
        super().__init__()
        self.model, self.ablations, self.names = model, ablations, model.names

    def forward(self, batch: Mapping[str, Any]) -> Output:
        tokens = self.model.encode(batch)  # type: ignore[operator]
        outputs = [self.model.fuse(take(tokens, names)) for take, names in self.ablations]  # type: ignore[operator]
        logits = torch.stack([output.logits for output in outputs], dim=1)
        return Output(features=logits, logits=logits)
