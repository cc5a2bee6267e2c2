"""Log-likelihood of an answer as a function of the number that is added to the logits of a modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..nn.eval_mode import eval_mode_no_grad
from ..recording import watch
from .answer_likelihood import IGNORED, log_likelihood
from .interventions import Labels
from .steering import Heads, steer

BETAS = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
"""Default offsets: the odds of the modality are multiplied by e^-4 to e^4."""


def dose_response(
    model: nn.Module, inputs: Mapping[str, Any], labels: Int[Tensor, "batch token"], name: str, *,
    betas: Sequence[float] = BETAS, layers: Sequence[str] | str | None = None, heads: Heads | None = None,
    modality: Labels | None = None, names: Sequence[str] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Measures the log-likelihood of an answer while the attention to a modality is raised and lowered by ``steer``.

    Args:
        model, inputs, labels: as in ``answer_effects``.
        name: the steered modality.
        betas: numbers added to the logits of its keys.
        layers, heads, modality, names: as in ``steer``.

    Returns:
        Rows {"beta", "share", "log_likelihood", "tokens"}: "share" is the mean share of the modality over the queries
        that predict the answer in the steered layers, "log_likelihood" in nats per token.

    Raises:
        ConfigError: no betas, or as in ``steer`` and ``answer_effects``.

    A curve that rises with beta says that more attention to the modality makes the answer more likely; a flat one, that
    the amount of attention does not matter. Far from 0 every curve falls, because the model was not trained there.
    """
    if not betas:
        raise ConfigError("dose_response betas", expected="one or more numbers", got=str(tuple(betas)))
    rows, queries = [], _predicting(model, labels)
    with eval_mode_no_grad(model):
        for beta in betas:
            arguments: dict[str, Any] = {"layers": layers, "modality": modality, "names": names}
            with (
                watch(model, queries=queries, **arguments) as record,
                steer(model, heads=heads, **arguments, **{name: beta}),  # type: ignore[arg-type]
            ):
                likely, tokens = log_likelihood(model, inputs, labels)
            column = record.names.index(name)
            shares = [record.share(layer)[..., column].mean() for layer in record.layers]
            share = float(sum(shares) / len(shares))
            rows.append({"beta": float(beta), "share": share, "log_likelihood": likely, "tokens": tokens})
    return rows


def _predicting(model: nn.Module, labels: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch query"]:
    """Returns the queries that predict a token of the answer."""
    if labels.ndim != 2:
        raise ShapeError("dose_response labels", expected="(batch, token)", got=f"{tuple(labels.shape)}")
    answer = labels != IGNORED
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        return answer
    return torch.nn.functional.pad(answer[:, 1:], (0, 1), value=False)
