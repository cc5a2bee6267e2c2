"""Benchmarks of pretrained models: metrics, normalized replies, and loading errors."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

import equipoise as eq
from equipoise.cli import run
from equipoise.data import load_dataset
from equipoise.data.sets.text_codes import WORDS
from equipoise.errors import ConfigError, DataError
from equipoise.evaluation import GenerativeVLM, PretrainedDualEncoder, ProcessedDataset, evaluate
from equipoise.evaluation.generative_models import (
    benchmark_question,
    normalize_answer,
    pretrained_answers,
    to_pil_image,
)
from equipoise.evaluation.model_loading import load_for_benchmark, matching_benchmark
from equipoise.evaluation.pointing import ROWS, attention_on_object, patch_coverage, word_position
from equipoise.inspection.patch_layout import PatchGrid
from equipoise.results import result_rows
from helpers import look as small_look
from helpers import published as small_published
from helpers.published_vlm import build_vlm
from helpers.tolerance import TOL


def assert_close(result, truth):
    torch.testing.assert_close(result, truth, **TOL[result.dtype])


@pytest.fixture(scope="module")
def emoji():
    return load_dataset("emoji")


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("scenes", samples=256)


def tie_counts(scores, target):
    """Of every query: wrong items above the best right one, wrong and right ones beside it."""
    for row in range(len(scores)):
        right = torch.tensor([number == target[row] for number in target])
        best = scores[row][right].max()
        above, beside = scores[row] > best, scores[row] == best
        yield int(above.sum()), int((beside & ~right).sum()), int((beside & right).sum())


def expected_recall(scores, target, k):
    """1 - the chance that the first k are all wrong, equal ones in random order."""
    result = []
    for above, wrong, right in tie_counts(scores, target):
        drawn = min(max(k - above, 0), wrong + right)
        result.append(1 - math.comb(wrong, drawn) / math.comb(wrong + right, drawn))
    return np.mean(result)


def expected_median(scores, target, draws=200):
    """By drawing orders of equal ones."""
    random, hits = np.random.default_rng(0), list(tie_counts(scores, target))
    ranks = [
        [above + 1 + np.flatnonzero(random.permutation(wrong + right) < right)[0] for above, wrong, right in hits]
        for _ in range(draws)
    ]
    return np.median(ranks, axis=1).mean()


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.slow), "blip2"])
def test_metrics_match_the_model_logits(emoji, kind):
    model, processor = getattr(small_published, kind)(), small_published.Processor()
    shown = ProcessedDataset(emoji, processor, pad_to_limit=kind == "siglip")
    full = next(shown.batches("val", 1000))
    mask = {} if kind == "siglip" else {"attention_mask": (full["text"] != 0).long()}
    with torch.no_grad():
        options = {"use_image_text_matching_head": False} if kind == "blip2" else {}
        scores = model(pixel_values=full["image"], input_ids=full["text"], **mask, **options).logits_per_image
    result = evaluate(model, processor, emoji, split="val")
    target = full["target"].tolist()
    # The model's own product rounds equal vectors apart.
    scores = scores.double().round(decimals=5)
    assert result["image_to_text/recall@5"] == pytest.approx(expected_recall(scores, target, 5))
    assert result["text_to_image/median_rank"] == pytest.approx(expected_median(scores.T, target), rel=0.01)
    if kind != "blip2":
        assert {"composed_to_image/recall@1", "modality_gap/image-text"} <= set(result)


def test_pad_token_equal_to_eos():
    # As in OpenAI's CLIP, whose vector of a caption is that of its end.
    model = small_published.clip()
    ids, mask = torch.tensor([[1, 4, 2, 2, 2], [1, 5, 6, 7, 2]]), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    space = PretrainedDualEncoder(model, padding=2, pad_is_eos=True)
    with torch.no_grad():
        messages = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        assert_close(space.embed({"text": ids})["text"], torch.nn.functional.normalize(messages, dim=-1))


def test_captions_are_inserted_into_the_template(emoji):
    shown = ProcessedDataset(emoji, small_published.Processor(), template="red {}")
    ids = [small_published.WORDS.index(word) for word in ("red", "heart")]
    assert shown.tokenize(["heart"])[0].tolist()[:2] == ids
    # Nothing else in braces means anything.
    twice = ProcessedDataset(emoji, small_published.Processor(), template="{} {cat} {}").tokenize(["heart"])[0].tolist()
    assert [number for number in twice if number > 3] == [5, 7, 5]
    with pytest.raises(ConfigError, match=r"evaluate template: expected a text with \{\}"):
        ProcessedDataset(emoji, small_published.Processor(), template="a picture")


def test_parts_of_combinations_are_separate_captions(emoji):
    shown = ProcessedDataset(emoji, small_published.Processor())
    result, items = shown.combinations("val"), emoji.split_items("val")
    for row, index in enumerate(result.rows.tolist()):
        own = shown.tokenize(items[index].parts)
        assert int(result.present[row].sum()) == len(items[index].parts)
        assert torch.equal(result.parts[row, 0, : own.shape[1]][: own.shape[1]], torch.nn.functional.pad(
            own, (0, result.parts.shape[2] - own.shape[1]))[0, : own.shape[1]])  # fmt: skip


def test_pointing_against_explicit_attention(scenes):
    asker = build_vlm()
    sample = next(
        index for index, kind in enumerate(scenes.kinds("test")) if kind == "color"
    )  # "what color is the <shape>"
    held = scenes.split("test").inputs
    regions = scenes.regions("test", torch.tensor([sample]))[0]
    index = int(regions.any(dim=1).nonzero()[0, 0])
    word = WORDS[int(held["text"][sample, index])]
    mass, chance = attention_on_object(asker, scenes, "test", sample, word, regions[index])
    prompt = asker.prompt(benchmark_question(scenes, "test", sample), to_pil_image(scenes, "test", sample)).inputs
    with torch.no_grad():
        written = asker.model(**prompt, output_attentions=True).attentions
    ids = prompt["input_ids"][0].tolist()
    pictured = torch.tensor(ids) == WORDS.index("<image>")
    row = max(position for position, number in enumerate(ids) if number == WORDS.index(word))
    # Tokens are as fine as the scene's patches, so that each is covered whole or not at all.
    region = regions[index].float()
    for layer, attention in enumerate(written):
        seen = attention[0, :, row, pictured]
        assert_close(mass[layer], (seen * region).sum(dim=-1) / seen.sum(dim=-1))
    assert chance == pytest.approx(float(region.mean()))


def test_generative_model_is_evaluated_with_and_without_its_image(scenes):
    asker = build_vlm()
    result = evaluate(asker.model, asker.processor, scenes, samples=8)
    assert {"accuracy", "accuracy_shuffled", "accuracy_blank", "caption_f1"} <= set(result)
    assert 0 < result["chance/color"] < 1
    assert 0 <= result["pointing/shape"] <= 1
    assert result == evaluate(asker.model, asker.processor, scenes, samples=8)


def test_blank_image_has_the_mean_gray_level(scenes, monkeypatch):
    asker, shown = build_vlm(), []
    result = SimpleNamespace(inputs={})
    monkeypatch.setattr(GenerativeVLM, "prompt", lambda self, text, picture: shown.append(picture) or result)
    monkeypatch.setattr(GenerativeVLM, "reply", lambda self, inputs, most: "")
    assert len(dict(pretrained_answers(asker, scenes, "test", 3, "blank", lambda: None))) == 3
    level = round(float(scenes.train.inputs["image"].double().mean()))
    assert [picture.getcolors() for picture in shown] == [[(192 * 192, (level, level, level))]] * 3


@pytest.mark.parametrize(
    ("message", "first", "read"),
    [
        ("Red.", True, "red"), ("10", True, ""), ("The answer is: yes", True, "yes"), ("2", True, "two"),
        ("bluish", True, ""),
        ("A red car, and 1 TREE!", False, "a red car and one tree"), ("", True, ""),
    ],
)  # fmt: skip
def test_replies_are_mapped_to_known_answers(scenes, message, first, read):
    assert normalize_answer(message, scenes, first=first) == read


def test_position_of_multi_token_words():
    assert word_position(["red", " tri", "angle", "s"], "triangle") == 2
    assert word_position(["red"], "blue") is None
    assert word_position([], "blue") is None


def test_words_inside_other_words_are_not_matched():
    asked = ["<|im_start|>", "user", " the", " star", "?", "<|im_end|>", "<|im_start|>", "assistant"]
    assert word_position(asked, "star") == 3
    assert word_position([" a", " scared", " card"], "car") is None
    assert word_position([" a", " car, parked"], "car") == 1


def test_cropped_regions_have_no_patch_coverage():
    region = torch.zeros(ROWS, ROWS, dtype=torch.bool)
    region[:, 0] = True
    assert patch_coverage(region.flatten(), PatchGrid(2, 2, True, ""), (0.25, 0.0, 0.75, 1.0)).sum() == 0
    assert_close(
        patch_coverage(region.flatten(), PatchGrid(3, 2, True, ""), (0.0, 0.0, 1.0, 1.0)),
        adaptive_avg_pool2d(region[None].float(), (3, 2)).flatten(),
    )


def test_model_state_is_restored(emoji):
    model = small_published.clip().train()
    state = torch.random.get_rng_state()
    evaluate(model, small_published.Processor(), emoji, split="val")
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unsupported_models_and_data_raise(scenes, emoji):
    with pytest.raises(ConfigError, match=r"an image and a text encoder.*got LlamaForCausalLM"):
        evaluate(small_look.build_llama(), small_published.Processor(), emoji)
    with pytest.raises(ConfigError, match="evaluate: expected the data set emoji, scenes or minimal_pairs, got Digits"):
        evaluate(small_published.clip(), small_published.Processor(), load_dataset("digits"))
    asker = build_vlm()
    with pytest.raises(ConfigError, match="expected samples >= 1, got samples = 0"):
        evaluate(asker.model, asker.processor, scenes, samples=0)


def test_models_are_loaded_from_folders(tmp_path):
    folder = small_published.saved_clip(tmp_path / "clip")
    assert matching_benchmark(folder) == "emoji"
    for name, model in (("writes", small_look.build_llava()), ("finds", small_published.blip2())):
        model.save_pretrained(tmp_path / name)
    assert (matching_benchmark(tmp_path / "writes"), matching_benchmark(tmp_path / "finds")) == ("scenes", "emoji")
    model, processor = load_for_benchmark("emoji", folder, device="cpu")
    assert_close(model.logit_scale, small_published.clip().logit_scale)
    assert isinstance(PretrainedDualEncoder(model, padding=processor.tokenizer.pad_token_id), torch.nn.Module)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="evaluate: expected a tokenizer of the model's 14 tokens, got one of"):
        load_for_benchmark("emoji", folder, device="cpu")
    with pytest.raises(DataError, match=r"evaluate: expected a folder or a name on the hub with config\.json"):
        matching_benchmark(tmp_path / "nowhere")
    assert eq.evaluate is evaluate


@pytest.mark.parametrize("size", [5, 3000])
def test_truncated_weights_raise(tmp_path, size):
    weights = small_published.saved_clip(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(
        DataError, match=r"evaluate: expected a folder .* with config\.json and model\.safetensors, got"
    ):
        load_for_benchmark("emoji", tmp_path, device="cpu")


def test_weights_of_another_size_raise(tmp_path):
    config = small_published.saved_clip(tmp_path) / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 20'))
    with pytest.raises(DataError, match=r"model\.safetensors, got '.*' \(You set `ignore_mismatched_sizes`"):
        load_for_benchmark("emoji", tmp_path, device="cpu")


def test_command_prints_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(small_published.saved_clip(tmp_path / "small"))
    assert run(["evaluate", ".", "--split", "val", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    message = result_rows.load_results(tmp_path / "out")
    assert message["protocol"]["methods"] == ["small"]
    assert message["runs"][0]["metrics"]["chance/recall@1"] == pytest.approx(1 / 183)
    assert "recall@1" in capsys.readouterr().out


def test_images_are_upscaled(scenes):
    shown = to_pil_image(scenes, "test", 0)
    assert isinstance(shown, Image.Image)
    assert shown.size == (192, 192)
