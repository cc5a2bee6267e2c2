"""Log-likelihood of an answer of a language model with modalities hidden or attention averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, NonFiniteError, ShapeError
from ..nn.eval_mode import eval_mode_no_grad
from ..recording import labels_for
from .attention_changes import MaskModality, QuagAveraging
from .interventions import Intervention, Labels, apply_intervention
from .quag_operators import ClsRows, chosen_operators

IGNORED = -100
"""Label of tokens that are not part of the answer."""


def answer_effects(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Int[Tensor, "batch token"],
    *,
    operators: Sequence[str] | None = None,
    modality: Labels | None = None,
    names: Sequence[str] | None = None,
    cls_rows: ClsRows = "keys",
) -> list[dict[str, Any]]:
    """Measures the effect of each modality and of averaged attention on the likelihood of a given answer.

    The log-likelihood is the mean of log p(token | previous tokens) over the tokens of the answer: without
    intervention, with each modality hidden from all queries (``without_modality``), and under QUAG operators
    (``with_quag``).

    Args:
        model: a Hugging Face causal or encoder-decoder model, on the device of the inputs.
        inputs: output of its processor; for a causal model it includes the answer.
        labels: (batch, token) token ids of the answer, -100 for all other tokens; aligned with the input tokens for a
            causal model, which predicts each token from the previous position.
        operators: QUAG operators; by default all, ``()`` for none.
        modality, names: labels of the keys, if they cannot be derived from the inputs; as in ``watch``.
        cls_rows: as in ``with_quag``.

    Returns:
        Rows {"change", "of", "log_likelihood", "drop", "tokens", "sites"}: "change" is "none", "mask" or "quag", "of"
        the modality or operator, "log_likelihood" in nats per token, "drop" the value without intervention minus it,
        "tokens" the number of answer tokens, "sites" the number of changed attention layers. Interventions without any
        layer to change are omitted.

    Raises:
        ConfigError: no intervention could be applied, an unknown operator, or a model without logits. ShapeError:
            labels that do not fit or contain no answer. NonFiniteError: a logit is NaN.

    Unlike an attention share, a drop is evidence of use. There is no drop if the answer is likely from the text alone;
    hiding text also hides the beginning of the answer.

    Reference: RollingQ (ICML 2025), Tables 8 and 9.
    """
    known = tuple(labels_for(model, modality, names)[0].names)
    interventions: list[tuple[str, str, Intervention]] = [
        ("mask", name, Intervention("answer_effects", MaskModality((name,)))) for name in known
    ]
    for name in chosen_operators(known, operators, cls_rows):
        interventions.append(("quag", name, Intervention("answer_effects", QuagAveraging(name, cls_rows))))
    with eval_mode_no_grad(model):
        full, tokens = log_likelihood(model, inputs, labels)
        rows = [_row("none", None, full, full, tokens, 0)]
        for change, name, one in interventions:
            with apply_intervention(model, one, modality=modality, names=names):
                left, _ = log_likelihood(model, inputs, labels)
            if one.changed:
                rows.append(_row(change, name, full, left, tokens, len(one.changed)))
    if len(rows) == 1:
        raise next((one.nothing(ran=True) for *_, one in interventions), None) or ConfigError(
            "answer_effects", expected="attention over known modalities", got="none",
            fix="Give one label for each key: modality=labels, names=names.",
        )  # fmt: skip
    return rows


def log_likelihood(
    model: nn.Module, inputs: Mapping[str, Any], labels: Int[Tensor, "batch token"]
) -> tuple[float, int]:
    """Returns the mean log-likelihood of the answer tokens in nats, and their number.

    Raises:
        ConfigError: a model without logits. ShapeError: labels that do not fit or contain no answer. NonFiniteError: a
            logit is NaN.
    """
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        logits, target = _logits(model(**{**inputs, "labels": labels}), labels), labels
    else:
        # The token at a position is predicted from the previous position.
        logits, target = _logits(model(**inputs), labels)[:, :-1], labels[:, 1:]
    answer = target != IGNORED
    if not bool(answer.any()):
        raise ShapeError(
            "answer_effects labels",
            expected=f"at least one answer token with a label other than {IGNORED}",
            got="none",
            fix="The first token of a causal model cannot be predicted.",
        )
    chosen = logits[answer].float()
    if bool(chosen.isnan().any()):
        raise NonFiniteError(
            "answer_effects", expected="logits without NaN", got="NaN at answer tokens",
            fix="Look for NaN in the inputs, then in the model's weights.",
        )  # fmt: skip
    likely = chosen.log_softmax(dim=-1).gather(1, target[answer][:, None])
    return float(likely.double().mean()), int(answer.sum())


def _logits(output: Any, labels: Tensor) -> Float[Tensor, "batch token word"]:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ConfigError(
            "answer_effects", expected="a model that returns logits (batch, token, word)",
            got=f"{type(output).__name__} without", fix="Load it as ...ForConditionalGeneration or ...ForCausalLM.",
        )  # fmt: skip
    if logits.shape[:2] != labels.shape:
        raise ShapeError(
            "answer_effects labels",
            expected=f"(batch, token) = {tuple(logits.shape[:2])} as the logits have",
            got=f"{tuple(labels.shape)}",
            fix=f"Give one label for each input token, {IGNORED} for tokens outside the answer.",
        )
    return logits


def _row(change: str, of: str | None, full: float, left: float, tokens: int, sites: int) -> dict[str, Any]:
    return {"change": change, "of": of, "log_likelihood": left, "drop": full - left, "tokens": tokens, "sites": sites}
