"""Choices of several tokens after one pass over the prompt: families, fallbacks, and the number of tokens."""

from contextlib import nullcontext

import pytest
import torch

from equipoise.diagnostics import steer, without_modality
from equipoise.evaluation import evaluate_questions
from equipoise.evaluation.questions.shared_prompts import ScoredAnswers, SharedPrompts, score_answers
from equipoise.inspection.prompt_inputs import complete_inputs
from helpers.look import build_llava, build_processor, wide_image
from helpers.vlms import family

ANSWERS = [torch.tensor([[7, 9, 11]]), torch.tensor([[8]]), torch.tensor([[12, 5]])]
CHOICES = ["the cat sits", "a dog", "mat"]


def complete_scores(model, inputs, answers, block=nullcontext):
    values, length = [], inputs["input_ids"].shape[1]
    for answer in answers:
        with torch.no_grad(), block():
            logits = model(**complete_inputs(inputs, answer, model.config.model_type)).logits[0, length - 1 : -1]
        values.append(float(logits.log_softmax(dim=-1).gather(1, answer.T).mean()))
    return values


@pytest.mark.parametrize("condition", ["given", "hidden", "steered"])
@pytest.mark.parametrize(("name", "kind"), [("llava", "image"), ("qwen2_vl", "image"), ("gemma3", "image"),
                                            ("idefics3", "image"), ("qwen2_audio", "audio")])  # fmt: skip
def test_scores_are_those_of_complete_passes(name, kind, condition):
    model, inputs = family(name)
    model = model.eval()
    for weight in model.parameters():
        weight.data *= 4 if weight.ndim > 1 else 1
    count = len(inputs["input_ids"])
    inputs = {key: value[: len(value) // count] for key, value in inputs.items()}
    blocks = {"given": nullcontext, "hidden": lambda: without_modality(model, kind),
              "steered": lambda: steer(model, **{kind: 2.0})}  # fmt: skip
    block = blocks[condition]
    expected = complete_scores(model, inputs, ANSWERS, block)
    for size in (1, 2) if condition == "given" else (1,):
        with torch.no_grad(), block():
            assert score_answers(model, inputs, ANSWERS, size) == pytest.approx(expected, abs=1e-5)


def build_rows(count=3):
    question = ["what", "is", "on", "the", "mat", "?"]
    return [{"image": wide_image(20 + index), "question": " ".join(question[: 6 - index % 2]), "choices": CHOICES,
             "answer": CHOICES[index % 3]} for index in range(count)]  # fmt: skip


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_prompts_are_read_once(size):
    model, processor = build_llava(), build_processor()
    tokens = []
    model.model.language_model.layers[0].register_forward_hook(
        lambda _, args, output: tokens.append(output.shape[0] * output.shape[1])
    )
    rows = build_rows(9)
    result = evaluate_questions(model, processor, rows, conditions=("given", "hidden"), steer=(2,), batch_size=size)
    assert result.failed == 0
    prompts = [processor(text=[f"<image>\n{row['question']}"], images=[row["image"]], return_tensors="pt")
               for row in rows]  # fmt: skip
    lengths = [inputs["input_ids"].shape[1] for inputs in prompts]
    # Questions of a group are checked: one or two for each condition, with one complete pass for each choice.
    assert sum(tokens) < 3 * (1.5 * sum(lengths) + size * 4 * max(lengths))
    tokenized = [torch.tensor([processor.tokenizer(text)["input_ids"]]) for text in CHOICES]
    for index, inputs in enumerate(prompts):
        for condition, block in (
            ("log_likelihood", nullcontext),
            ("steer 2 log_likelihood", lambda: steer(model, image=2.0)),
        ):
            values = complete_scores(model, dict(inputs), tokenized, block)
            assert result.extra[condition][index] == pytest.approx(values[index % 3], abs=1e-4)


@pytest.mark.parametrize("fault", ["other logits", "error"])
def test_complete_passes_where_a_cache_differs(fault):
    rows, processor = build_rows(), build_processor()
    expected = evaluate_questions(build_llava(), processor, rows)
    model = build_llava()

    def disturb(_, args, kwargs, output):
        if kwargs.get("pixel_values") is None and kwargs["input_ids"].shape[1] < 4:
            if fault == "error":
                raise NotImplementedError("no cache")
            output.logits[..., 7] += 3
        return output

    handle = model.register_forward_hook(disturb, with_kwargs=True)
    result = evaluate_questions(model, processor, rows)
    handle.remove()
    assert result.failed == 0
    assert result.replies == expected.replies
    assert result.extra["log_likelihood"] == pytest.approx(expected.extra["log_likelihood"], abs=1e-4)


def test_kinds_are_trusted_after_equal_scores_only():
    prompts = SharedPrompts(build_llava())
    scores = ScoredAnswers([-1.0, -2.0], 0.5)
    assert prompts.may_share("a")
    assert not prompts.is_trusted("a")
    prompts.check("a", scores, ScoredAnswers([-1.0, -2.00001], 0.5))
    assert prompts.is_trusted("a")
    prompts.check("a", scores, ScoredAnswers([-1.0, -2.01], 0.5))
    assert not prompts.may_share("a")
    prompts.check("b", scores, ScoredAnswers([-1.0, -2.0], 0.6))
    prompts.check("c", None, scores)
    assert not prompts.may_share("b")
    assert not prompts.may_share("c")


def test_padded_prompts_and_rotations_by_length_are_not_shared():
    model, inputs = family("llava")
    inputs = {name: value[:1] for name, value in inputs.items()}
    padded = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    padded["attention_mask"][0, 0] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="padding"):
        score_answers(model, padded, ANSWERS, 1)
    model.config.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not SharedPrompts(model).may_share("a")
