"""How likely a language model finds an answer when it cannot see a modality, or reads it averaged."""

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
"""Label of a token that is no part of the answer."""


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
    """What each modality and each part of attention does for an answer that is given.

    The mean of log p(token | what comes before) over the answer's tokens: untouched, with each modality hidden from
    every query (``without_modality``), and under operators of QUAG (``with_quag``).

    Args:
        model: a Hugging Face causal or encoder-decoder model, on the device of the inputs.
        inputs: what its processor made, the answer among them for a causal model.
        labels: (batch, token) the answer, -100 for tokens that are none; in the place of the inputs' tokens for a
            causal model, which predicts each from the place before.
        operators: of QUAG; by default all, ``()`` for none.
        modality, names: labels of the keys, where the model's inputs do not tell them; as in ``watch``.
        cls_rows: as in ``with_quag``.

    Returns:
        Rows {"change", "of", "log_likelihood", "drop", "tokens", "sites"}: change is "none", "mask" or "quag", of the
        modality or operator, log_likelihood in nats per token, drop the untouched one minus it, tokens how many the
        answer has, sites how many attention layers were changed. A change that finds nothing to act on has no row.

    Raises:
        ConfigError: nothing but the untouched row, an unknown operator, a model without logits. ShapeError: labels that
            do not fit, or hold no answer. NonFiniteError: logits that are NaN.

    A drop is evidence of use, unlike a share of attention. An answer that was likely from its words alone has none; and
    hiding text hides the answer's own beginning too.

    Reference: spec 8.5 and 8.6.
    """
    known = tuple(labels_for(model, modality, names)[0].names)
    made: list[tuple[str, str, Intervention]] = [
        ("mask", name, Intervention("answer_effects", MaskModality((name,)))) for name in known
    ]
    for name in chosen_operators(known, operators, cls_rows):
        made.append(("quag", name, Intervention("answer_effects", QuagAveraging(name, cls_rows))))
    with eval_mode_no_grad(model):
        full, tokens = log_likelihood(model, inputs, labels)
        rows = [_row("none", None, full, full, tokens, 0)]
        for change, name, one in made:
            with apply_intervention(model, one, modality=modality, names=names):
                left, _ = log_likelihood(model, inputs, labels)
            if one.changed:
                rows.append(_row(change, name, full, left, tokens, len(one.changed)))
    if len(rows) == 1:
        raise next((one.nothing(ran=True) for *_, one in made), None) or ConfigError(
            "answer_effects", expected="attention over known modalities", got="none",
            fix="Give one label for every key: modality=labels, names=names.",
        )  # fmt: skip
    return rows


def log_likelihood(
    model: nn.Module, inputs: Mapping[str, Any], labels: Int[Tensor, "batch token"]
) -> tuple[float, int]:
    """(mean log-likelihood of the answer's tokens in nats, how many there are).

    Raises:
        ConfigError: a model without logits. ShapeError: labels that do not fit, or hold no answer. NonFiniteError:
            logits that are NaN.
    """
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        logits, target = _logits(model(**{**inputs, "labels": labels}), labels), labels
    else:
        # The token at a place is predicted one place before.
        logits, target = _logits(model(**inputs), labels)[:, :-1], labels[:, 1:]
    answer = target != IGNORED
    if not bool(answer.any()):
        raise ShapeError(
            "answer_effects labels", expected=f"at least one token of the answer that is not {IGNORED}", got="none",
            fix="Of a causal model the first token has nothing that predicts it.",
        )  # fmt: skip
    chosen = logits[answer].float()
    if bool(chosen.isnan().any()):
        raise NonFiniteError(
            "answer_effects", expected="logits that are numbers", got="NaN at tokens of the answer",
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
            "answer_effects labels", expected=f"(batch, token) = {tuple(logits.shape[:2])} as the logits have",
            got=f"{tuple(labels.shape)}", fix=f"Give one label for every token of the inputs, {IGNORED} for no answer.",
        )  # fmt: skip
    return logits


def _row(change: str, of: str | None, full: float, left: float, tokens: int, sites: int) -> dict[str, Any]:
    return {"change": change, "of": of, "log_likelihood": left, "drop": full - left, "tokens": tokens, "sites": sites}
