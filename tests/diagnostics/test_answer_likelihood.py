"""Log-likelihood of answers under interventions, against logits read one by one."""

import math

import pytest
import torch
from torch import nn

from equipoise.diagnostics.answer_likelihood import answer_effects, log_likelihood
from equipoise.diagnostics.interventions import with_quag, without_modality
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from helpers.model_state import hooks
from helpers.tolerance import TOL
from helpers.vlms import IMAGE, family

SINGLE = TOL[torch.float32]
PADDED = -100


def answer_labels(ids, lengths):
    """The last tokens of each sample."""
    labels = torch.full_like(ids, PADDED)
    for sample, length in enumerate(lengths):
        labels[sample, -length:] = ids[sample, -length:]
    return labels


def expected_likelihood(logits, labels, *, shift):
    """The mean over all tokens of the answers."""
    result = []
    for rows, words in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for index, word in enumerate(words):
            if word != PADDED and index >= shift:
                row = rows[index - shift]
                top = max(row)
                result.append(row[word] - top - math.log(sum(math.exp(x - top) for x in row)))
    return sum(result) / len(result), len(result)


def build_case(name):
    """(model, inputs, labels, shift)."""
    model, inputs = family(name)
    if name == "whisper":
        labels = inputs.pop("decoder_input_ids")
        labels[1, -2:] = PADDED
        return model, inputs, labels, 0
    return model, inputs, answer_labels(inputs["input_ids"], (3, 2)), 1


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "blip2", "whisper", "llama"])
def test_rows(name):
    model, inputs, labels, shift = build_case(name)
    given = {**inputs, "labels": labels} if name == "whisper" else inputs
    rows = answer_effects(model, inputs, labels)
    with torch.no_grad():
        full, tokens = expected_likelihood(model(**given).logits, labels, shift=shift)
    assert rows[0] == {
        "change": "none", "of": None, "log_likelihood": pytest.approx(full, rel=SINGLE["rtol"]), "drop": 0.0,
        "tokens": tokens, "sites": 0,
    }  # fmt: skip
    other = {"whisper": "audio", "llama": None}.get(name, "image")
    names = ["text"] if other is None else ["text", other]
    assert [row["of"] for row in rows if row["change"] == "mask"] == names
    operators = ["unimodal", "crossmodal", *(f"avg-{one}" for one in names), "all"]
    assert [row["of"] for row in rows if row["change"] == "quag"] == [
        one for one in operators if other is not None or one != "crossmodal"
    ]
    for row in rows[1:]:
        block = without_modality if row["change"] == "mask" else with_quag
        with torch.no_grad(), block(model, row["of"]) as result:
            logits = model(**given).logits
        left, _ = expected_likelihood(logits, labels, shift=shift)
        assert row["log_likelihood"] == pytest.approx(left, rel=SINGLE["rtol"])
        assert row["drop"] == rows[0]["log_likelihood"] - row["log_likelihood"]
        assert row["sites"] == len(result.changed) > 0
        assert row["tokens"] == tokens
    assert len({row["log_likelihood"] for row in rows}) > 3 - (other is None)


def test_modalities_without_tokens_have_no_row():
    model, inputs, labels, _ = build_case("qwen3_vl")
    words = {name: inputs[name].clone() for name in ("input_ids", "attention_mask")}
    words["input_ids"][words["input_ids"] == IMAGE] = 5
    rows = answer_effects(model, words, labels, operators=("crossmodal", "avg-image", "avg-text"))
    assert [(row["change"], row["of"]) for row in rows] == [("none", None), ("mask", "text"), ("quag", "avg-text")]
    assert [row["of"] for row in answer_effects(model, words, labels, operators=())] == [None, "text"]


def test_user_labels():
    model, inputs, labels, _ = build_case("llama")
    modality = torch.tensor([0] * 4 + [1] * 5 + [0] * 4)
    rows = answer_effects(model, inputs, labels, operators=("avg-b",), modality=modality, names=("a", "b"))
    assert [row["of"] for row in rows] == [None, "a", "b", "avg-b"]
    moved = {**inputs, "input_ids": inputs["input_ids"].clone()}
    moved["input_ids"][:, 4:9] = 7
    again = answer_effects(model, moved, labels, operators=(), modality=modality, names=("a", "b"))
    assert again[2]["log_likelihood"] == rows[2]["log_likelihood"]
    assert again[0]["log_likelihood"] != rows[0]["log_likelihood"]


class Answering(nn.Module):
    """Returns what it was made with."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, **inputs):
        return self


def test_errors():
    model, inputs, labels, _ = build_case("llava")
    with pytest.raises(
        ShapeError, match=r"answer_effects labels: expected \(batch, token\) = \(2, 13\) .* got \(2, 11\)"
    ):
        answer_effects(model, inputs, labels[:, :11])
    nothing = torch.full_like(labels, PADDED)
    nothing[:, 0] = 3
    with pytest.raises(ShapeError, match=r"labels: expected at least one answer token .*, got none. The first token"):
        answer_effects(model, inputs, nothing)
    with pytest.raises(ConfigError, match=r"answer_effects: expected a known operator, got 'avg-imag'. Did you mean"):
        answer_effects(model, inputs, labels, operators=("avg-imag",))
    clip, prompt = family("clip")
    with pytest.raises(
        ConfigError, match=r"a model that returns logits \(batch, token, word\), got CLIPOutput without"
    ):
        answer_effects(clip, prompt, labels)
    bare = Answering(torch.zeros(2, 13, 5))
    with pytest.raises(ConfigError, match="answer_effects: expected attention over known modalities, got none"):
        answer_effects(bare, {}, labels.clamp(max=4))
    bare.logits[0, -2] = math.nan
    with pytest.raises(NonFiniteError, match="answer_effects: expected logits without NaN, got NaN at answer tokens"):
        log_likelihood(bare, {}, labels.clamp(max=4))


@pytest.mark.parametrize("fails", [False, True])
def test_model_state_is_restored(fails):
    model, inputs, labels, _ = build_case("llava")
    model(**inputs)
    model.train()
    model.lm_head.eval()
    before = hooks(model), [part.training for part in model.modules()], torch.random.get_rng_state().tolist()
    if fails:
        with pytest.raises(ShapeError):
            answer_effects(model, inputs, labels[:, 1:])
    else:
        first, second = (answer_effects(model, inputs, labels) for _ in range(2))
        assert first == second
    assert (hooks(model), [part.training for part in model.modules()], torch.random.get_rng_state().tolist()) == before
    assert all(parameter.grad is None for parameter in model.parameters())
