"""Winoground scores of two-tower and generative models on minimal pairs, against explicit forward passes."""

import csv
import json

import pytest
import torch
from PIL import Image

from equipoise.alignment import winoground
from equipoise.cli import run
from equipoise.data import load_dataset
from equipoise.errors import ConfigError, ShapeError
from equipoise.evaluation import MinimalPairScores, evaluate, score_pairs
from equipoise.evaluation.generative_models import DESCRIBE, to_pil_image
from equipoise.evaluation.minimal_pair_scores import CHANCE, Z, wilson_interval
from helpers import encoder_decoders, published
from helpers.published_vlm import build_vlm
from helpers.tolerance import TOL


@pytest.fixture(scope="module")
def pairs():
    return load_dataset("minimal_pairs", pairs=3)


def gray_image(source):
    level = round(float(source.train.inputs["image"].double().mean()))
    return Image.new("RGB", (192, 192), (level, level, level))


@pytest.mark.parametrize("kind", ["clip", "siglip", "blip2"])
def test_cosines_of_two_tower_models(pairs, kind):
    model, processor = getattr(published, kind)(), published.Processor()
    result = score_pairs(model, processor, pairs, template="red {}")
    index = 4
    images = [*(to_pil_image(pairs, "test", 2 * index + one) for one in (0, 1)), gray_image(pairs)]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    captions = [f"red {caption}" for caption in pairs.pair("test", index).captions]
    padding = {"padding": "max_length", "max_length": 32} if kind == "siglip" else {"padding": True}
    given = processor.tokenizer(captions, return_tensors="pt", **padding)
    mask = {} if kind == "siglip" else {"attention_mask": given["attention_mask"]}
    options = {"use_image_text_matching_head": False} if kind == "blip2" else {}
    with torch.no_grad():
        output = model(pixel_values=pixels, input_ids=given["input_ids"], **mask, **options)
    logits = output.logits_per_image
    if kind == "siglip":
        logits = logits - model.logit_bias
    expected = logits / (1 if kind == "blip2" else model.logit_scale.exp())
    actual = torch.cat([result.scores[index], result.blank[index][None]]).float()
    torch.testing.assert_close(actual, expected.detach(), **TOL[torch.float32])


def test_log_likelihoods_of_generative_models(pairs):
    asker = build_vlm()
    result = score_pairs(asker.model, asker.processor, pairs, split="val")
    index = 7
    images = [*(to_pil_image(pairs, "val", 2 * index + one) for one in (0, 1)), gray_image(pairs)]
    actual = torch.cat([result.scores[index], result.blank[index][None]])
    for row, image in enumerate(images):
        for column, caption in enumerate(pairs.pair("val", index).captions):
            inputs = asker.prompt(DESCRIBE, image).inputs
            words = asker.processor.tokenizer(caption, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([inputs["input_ids"], words], dim=1)
            with torch.no_grad():
                logits = asker.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
            steps = torch.log_softmax(logits[-words.shape[1] - 1 : -1], dim=-1)
            expected = float(sum(step[word] for step, word in zip(steps, words[0], strict=True)))
            assert float(actual[row, column]) == pytest.approx(expected, rel=1e-4)


def made(pairs, scores, blank=None):
    count = len(pairs.pairs("test"))
    blank = torch.zeros(count, 2) if blank is None else blank
    return MinimalPairScores(pairs.pairs("test"), scores.expand(count, 2, 2), blank)


def test_metrics_by_kind(pairs):
    scores = torch.randn(15, 2, 2, generator=torch.Generator().manual_seed(0))
    result = made(pairs, scores)
    metrics = result.metrics()
    rows = slice(3, 6)
    assert (metrics["text/left"], metrics["image/left"], metrics["group/left"]) == tuple(winoground(scores[rows]))
    own = [scores[n, i, i] > scores[n, i, 1 - i] for n in range(3, 6) for i in (0, 1)]
    assert metrics["caption/left"] == pytest.approx(sum(map(bool, own)) / 6)
    assert metrics["text"] == winoground(scores).text
    # A preference for the second caption hides that the scores depend on the image.
    biased = made(pairs, torch.tensor([[1.0, 0.0], [0.0, 1.0]]) + torch.tensor([0.0, 5.0]),
                  torch.tensor([[0.0, 5.0]]).expand(15, 2)).metrics()  # fmt: skip
    assert (biased["text"], biased["image"], biased["text/minus_blank"], biased["group/minus_blank"]) == (0, 1, 1, 1)
    assert "image/minus_blank" not in biased


def test_model_that_ignores_the_image_is_at_chance_or_below(pairs):
    blank = torch.randn(15, 2, generator=torch.Generator().manual_seed(1))
    metrics = made(pairs, blank[:, None].expand(-1, 2, -1), blank).metrics()
    for suffix in ("", "/blank"):
        # It selects the same caption for both images, so that exactly one is right.
        assert metrics[f"caption{suffix}"] == 0.5
        assert (metrics[f"text{suffix}"], metrics[f"image{suffix}"], metrics[f"group{suffix}"]) == (0, 0.25, 0)
    assert metrics["text/minus_blank"] == CHANCE["text"]
    assert metrics["group/minus_blank"] == pytest.approx(CHANCE["group"])


def test_chance_levels():
    scores = torch.randn(200_000, 2, 2, generator=torch.Generator().manual_seed(2))
    for name, value in winoground(scores)._asdict().items():
        assert value == pytest.approx(CHANCE[name], abs=0.005)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 10), (0.3, 17), (1.0, 4)])
def test_wilson_interval_solves_its_equation(rate, count):
    ends = wilson_interval(rate, count)
    assert 0 <= ends[0] <= rate + 1e-12
    assert rate - 1e-12 <= ends[1] <= 1
    for end in ends:
        assert (end - rate) ** 2 == pytest.approx(Z**2 * end * (1 - end) / count, abs=1e-12)


def test_command(tmp_path, capsys):
    folder = published.saved_clip(tmp_path / "clip")
    out = tmp_path / "out"
    given = ["evaluate", str(folder), "--data", "minimal_pairs", "--samples", "2", "--device", "cpu", "--out", str(out)]
    assert run(given) == 0
    text = capsys.readouterr().out
    assert "chance" in text
    assert "state" in text
    content = json.loads((out / "results.json").read_text())
    (entry,) = content["runs"]
    source = load_dataset("minimal_pairs", pairs=2)
    expected = evaluate(published.clip(), published.Processor(), source)
    assert entry["metrics"] == pytest.approx(expected)
    assert entry["intervals"]["group/color"] == pytest.approx(wilson_interval(expected["group/color"], 2))
    with open(out / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == [pair.kind for pair in source.pairs("test")]
    scores = torch.tensor([[float(rows[n][f"s_{i}{j}"]) for i in (0, 1) for j in (0, 1)] for n in range(10)])
    assert winoground(scores.view(-1, 2, 2)).text == pytest.approx(expected["text"])
    assert rows[0]["caption_0"] == source.pair("test", 0).captions[0]


def test_unsupported_inputs_raise(pairs):
    clip, processor = published.clip(), published.Processor()
    with pytest.raises(ConfigError, match="score_pairs: expected the data set minimal_pairs, got Digits"):
        score_pairs(clip, processor, load_dataset("digits"))
    with pytest.raises(ConfigError, match=r"expected a text with \{\} in place of the caption, got 'a picture'"):
        score_pairs(clip, processor, pairs, template="a picture")
    model, other, _ = encoder_decoders.build("florence2")
    with pytest.raises(ConfigError, match="got the encoder-decoder Florence2ForConditionalGeneration"):
        score_pairs(model, other, pairs)
    with pytest.raises(ShapeError, match=r"expected pairs, scores \(pair, 2, 2\) and blank \(pair, 2\), got 0 pairs"):
        MinimalPairScores([], torch.zeros(0, 2, 2), torch.zeros(0, 2))


def test_model_and_random_state_are_not_changed(pairs):
    clip = published.clip().train()
    state = torch.get_rng_state()
    result = score_pairs(clip, published.Processor(), pairs)
    assert clip.training
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(result) == result.table()
