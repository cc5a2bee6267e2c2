"""Answers without some of the modalities, by the parts of a FusionModel: encoders once, fusion as often as needed."""

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
    """What is asked of a model; ``FusionModel`` has it all."""

    names: tuple[str, ...]
    encoders: nn.ModuleDict
    task: str

    def encode(self, batch: Any) -> dict[str, Tokens]: ...
    def fuse(self, tokens: Mapping[str, Tokens]) -> Output: ...
    def loss(self, logits: Tensor, target: Tensor) -> Tensor: ...


def remove_modality(tokens: Mapping[str, Tokens], names: Collection[str]) -> dict[str, Tokens]:
    """Tokens of which some modalities have none, as in a batch that lacks them: nothing reads them in any layer."""
    return keep_modalities(tokens, [name for name in tokens if name not in names])


def zero_modality(tokens: Mapping[str, Tokens], names: Collection[str]) -> dict[str, Tokens]:
    """Tokens of which some modalities are zeros that take part all the same; their pooled vectors are zero.

    Example:
        >>> zeroed({"audio": Tokens(torch.ones(2, 3, 1))}, ["audio"])["audio"].pooled().tolist()
        [[0.0], [0.0]]
    """
    return {
        name: replace(part, values=torch.zeros_like(part.values)) if name in names else part
        for name, part in tokens.items()
    }


Taking = Callable[[Mapping[str, Tokens], Collection[str]], dict[str, Tokens]]
TAKING: dict[str, Taking] = {"mask": remove_modality, "zero": zero_modality}
"""Semantics -> how a modality is taken away."""


def ablated_logits(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    without: Sequence[Collection[str]],
    *,
    semantics: Semantics = "mask",
) -> CollectedPredictions:
    """A reading whose logits are (sample, set, output): a FusionModel's answers without each set of modalities in turn.

    The encoders run once for each batch.
    """
    return collect_predictions(_Ablated(model, [(TAKING[semantics], names) for names in without]), loader)


def record_fusion(model: nn.Module, who: str) -> FusedLogits:
    """The model, where it is a FusionModel or has the same parts.

    Raises:
        ConfigError: it has not.
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
    """Encodes a batch once and fuses it several times."""

    def __init__(self, model: nn.Module, ways: Sequence[tuple[Taking, Collection[str]]]) -> None:
        super().__init__()
        self.model, self.ways, self.names = model, ways, model.names

    def forward(self, batch: Mapping[str, Any]) -> Output:
        tokens = self.model.encode(batch)  # type: ignore[operator]
        outputs = [self.model.fuse(take(tokens, names)) for take, names in self.ways]  # type: ignore[operator]
        logits = torch.stack([output.logits for output in outputs], dim=1)
        return Output(features=logits, logits=logits)
