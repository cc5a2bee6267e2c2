"""Information of the modalities on the target, and how much of it a model uses: is it the data or the model?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Output, as_output
from .information_decomposition import InformationDecomposition, decompose_information
from .prediction_collection import collect_predictions


def information(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], *, folds: int = 5, seed: int = 0
) -> InformationDecomposition:
    """Decomposes the information in the outputs of the encoders, and compares it with that in the predictions.

    The features are the pooled tokens of each encoder. ``joint - used`` is information that the encoders deliver and
    the fusion does not use (the model); ``gain`` is what any fusion can add to the best modality (the data, as
    encoded). See ``decompose_information``.

    Args:
        model: a FusionModel, or any other model after ``eq.adapt``, for a classification or a regression of one output.
        loader: batches of held-out data, dicts with every modality and ``"target"``.
        folds: number of folds, >= 2.
        seed: of folds and networks.

    Returns:
        InformationDecomposition with ``used``. Samples that lack a modality are left out.

    Raises:
        ConfigError: a model of one modality, or multilabel; fewer than 20 samples. ShapeError: no batch, or no targets.

    Features of a model say what its encoders kept, not what its inputs contain: an encoder that joint training left
    undertrained has little information on either. Pass features of encoders that were trained alone, or of the inputs,
    to ``decompose_information`` to evaluate the data."""
    names = tuple(getattr(model, "names", ()))
    task = getattr(model, "task", None)
    if len(names) < 2 or task not in ("classification", "regression"):
        raise ConfigError(
            "information", expected="a classification or regression model of two or more modalities",
            got=f"{type(model).__name__} with task {task!r} and modalities {', '.join(names) or 'none'}",
        )  # fmt: skip
    recorder = _PooledTokens(model)
    collected = collect_predictions(recorder, loader)
    *columns, logits = collected.logits.split(recorder.widths, dim=1)
    features = dict(zip(names, columns, strict=True))
    return decompose_information(features, collected.target, predictions=logits, folds=folds, seed=seed)


class _PooledTokens(nn.Module):
    """Returns the pooled tokens of all modalities beside the logits, as logits of an Output.

    A modality that a sample lacks is infinite, as NaN is refused for predictions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.names = model, model.names
        self.widths: list[int] = []

    def forward(self, batch: Mapping[str, Any]) -> Output:
        output = as_output(self.model, self.model(batch), "information")
        parts: list[Tensor] = []
        for name in self.names:  # type: ignore[union-attr]
            tokens = output.tokens[name]
            has = tokens.present() if len(tokens) else torch.zeros(len(tokens.values), dtype=torch.bool)
            vectors = tokens.pooled().float()
            parts.append(vectors.masked_fill(~has.to(vectors.device)[:, None], torch.inf))
        assert output.logits is not None
        parts.append(output.logits.float())
        self.widths = [part.shape[1] for part in parts]
        joined = torch.cat(parts, dim=1)
        return Output(features=joined, logits=joined)
