"""eq.diagnostics.robustness: scores of models with known use of their modalities, and what is derived from them."""

import math

import pytest
import torch

import equipoise as eq
from equipoise.diagnostics import corruptions, robustness, robustness_test
from equipoise.diagnostics.suite import diagnose
from equipoise.errors import ConfigError, ShapeError
from helpers import fusion
from helpers.diagnosis import labeled_batches, weighted_model


def test_corruption_of_the_only_used_modality():
    model = weighted_model(audio=1.0, image=0.0)
    loader = labeled_batches(model)
    result = robustness(model, loader, corruptions=["white_noise", "missing", "gain"], severities=[1, 5])
    assert result.clean == 1.0
    assert result.scores["audio", "white_noise", 5] < 0.6 < 0.8 < result.scores["audio", "white_noise", 1]
    # The logits are linear: a gain changes no prediction.
    assert result.scores["audio", "gain", 5] == 1.0
    assert all(score == 1.0 for (name, _, _), score in result.scores.items() if name == "image")
    assert result.alone == {"audio": 1.0, "image": pytest.approx(1 / 3, abs=0.1)}
    assert result.best_intact("image") == 1.0
    assert result.mean("image") == 1.0
    expected = [score for (name, kind, _), score in result.scores.items() if (name, kind) == ("audio", "missing")]
    assert result.mean("audio", "missing") == pytest.approx(sum(expected) / 2)
    assert result.share_near_intact == 1.0


def test_scores_match_corrupted_batches():
    model = weighted_model(audio=1.0, image=0.7)
    loader = labeled_batches(model, sizes=(53, 31))
    statistics = {"audio": (0.5, 2.0)}
    result = robustness(
        model, lambda: iter(loader), modalities=["audio"], severities=[3], seed=7, statistics=statistics
    )
    assert {kind for _, kind, _ in result.scores} == set(corruptions.corruption_names("sequence"))
    for (name, kind, severity), score in result.scores.items():
        right = []
        for number, batch in enumerate(loader):
            seed = 7 * 1_000_003 + number
            damaged = corruptions.corrupt_batch(
                batch, name, kind, severity=severity, seed=seed, statistics=statistics["audio"]
            )
            with torch.no_grad():
                right.append(model(damaged).logits.argmax(dim=1) == batch["target"])
        assert score == pytest.approx(float(torch.cat(right).float().mean()))
    rows = result.rows()
    assert all(row["drop"] == pytest.approx(result.clean - row["score"]) for row in rows)
    assert all(row["distance"] == pytest.approx(row["score"] - result.alone["image"]) for row in rows)


def test_undamaged_inputs_are_encoded_once_for_each_batch():
    model = weighted_model(audio=1.0, image=0.7)
    calls = []
    for name, encoder in model.encoders.items():
        encoder.forward = lambda values, name=name, run=encoder.forward: (calls.append(name), run(values))[1]
    before = [encoder.forward for encoder in model.encoders.values()]
    loader = labeled_batches(model, sizes=(53, 31))
    robustness(model, loader, modalities=["audio"], corruptions=["gain", "zeros"])
    # Two batches and ten damages; other passes encode both modalities.
    assert calls.count("audio") - calls.count("image") == 2 * 10 - 2
    assert [encoder.forward for encoder in model.encoders.values()] == before


@pytest.mark.parametrize("most", [1, 84 * 3 * 3])
def test_result_does_not_depend_on_the_number_of_passes(most, monkeypatch):
    model = weighted_model(audio=1.0, image=0.7)
    passes = []

    def loader():
        passes.append(1)
        return labeled_batches(model, sizes=(53, 31))

    options = {"corruptions": ["gain", "zeros"], "severities": [2, 4]}
    whole = robustness(model, loader, **options)
    one_pass = len(passes)
    monkeypatch.setattr(robustness_test, "MOST_LOGITS", most)
    assert robustness(model, loader, **options).scores == whole.scores
    # Eight damages: one in each pass, or three.
    assert len(passes) - 2 * one_pass == {1: 8, 84 * 3 * 3: 3}[most] - 1


class ReusedBuffers:
    """A loader that copies every batch into the same tensors."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        buffers = {name: value.clone() for name, value in self.batches[0].items()}
        for batch in self.batches:
            for name, value in batch.items():
                buffers[name].copy_(value)
            yield buffers


def test_loader_that_reuses_its_tensors():
    model = weighted_model(audio=1.0, image=0.7)
    for encoder in model.encoders.values():
        # The output of an identity would be the tensor of the loader itself.
        encoder.forward = torch.clone
    batches = labeled_batches(model, sizes=(40, 40))
    options = {"modalities": ["audio"], "corruptions": ["gain", "zeros"]}
    assert robustness(model, ReusedBuffers(batches), **options).scores == robustness(model, batches, **options).scores


def test_model_below_its_intact_modality():
    model = weighted_model(audio=100.0, image=1.0)
    loader = labeled_batches(weighted_model(audio=0.0, image=1.0))
    result = robustness(model, loader, corruptions=["swapped"], modalities=["audio"], severities=[5])
    assert result.rows()[0]["distance"] < -0.3
    assert result.share_near_intact == 0.0


def test_other_inputs_and_models():
    single = weighted_model(audio=1.0)
    result = robustness(single, labeled_batches(single), corruptions=["zeros"], severities=[5])
    assert math.isnan(result.best_intact("audio"))
    assert math.isnan(result.share_near_intact)
    assert "nan" not in result.table()
    model = fusion.joint_model().eval()
    loader = [fusion.batch(size=11, missing=("image",)), fusion.batch(size=1, seed=2)]
    result = robustness(model, loader, severities=[5], kinds={"audio": "spectrogram"})
    assert {kind for name, kind, _ in result.scores if name == "audio"} == set(
        corruptions.corruption_names("spectrogram")
    )
    assert all(math.isfinite(score) for score in result.scores.values())


def test_table_frame_and_figure(tmp_path):
    model = weighted_model(audio=1.0, image=0.7)
    result = robustness(model, labeled_batches(model), corruptions=["zeros", "frozen"], severities=[1, 5])
    lines = result.table().splitlines()
    assert lines[0].split() == ["modality", "corruption", "1", "5", "mean", "best", "intact"]
    assert len(lines) == 1 + 4 + 2
    frame = result.to_pandas()
    assert len(frame) == 8
    assert frame["score"].mean() == pytest.approx(result.mean())
    text = result.save_figure(tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert 'xmlns="http://www.w3.org/2000/svg"' in text
    assert "damaged: audio" in text
    assert result.save_figure(tmp_path / "again.svg").read_text(encoding="utf-8") == text


def test_optional_test_of_a_diagnosis(tmp_path):
    model = weighted_model(audio=1.0, image=0.7)
    loader = labeled_batches(model, sizes=(23,))
    assert "robustness" not in diagnose(model, loader, tests=["score"]).details
    result = diagnose(model, loader, tests=["robustness"])
    direct = robustness(model, loader, severities=(1, 3, 5))
    assert result.metrics["robustness/audio"] == pytest.approx(direct.mean("audio"))
    page = result.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="test-robustness"' in page
    assert "Mean score over damages of audio" in page
    result.save(tmp_path)
    loaded = eq.Diagnosis.load(tmp_path)
    assert loaded.metrics["robustness/image"] == result.metrics["robustness/image"]
    assert 'id="test-robustness"' in loaded.report(tmp_path / "again.html").read_text(encoding="utf-8")


def test_errors():
    model = weighted_model(audio=1.0, image=0.7)
    loader = labeled_batches(model)
    with pytest.raises(ConfigError, match="known modality, got 'sound'"):
        robustness(model, loader, modalities=["sound"])
    with pytest.raises(ConfigError, match="known corruption, got 'zero'"):
        robustness(model, loader, corruptions=["zero"])
    with pytest.raises(ConfigError, match=r"severities from 1 to 5, got \[6\]"):
        robustness(model, loader, severities=[6])
    with pytest.raises(ConfigError, match=r"corruptions that fit an input of the model, .* got replaced"):
        robustness(model, loader, corruptions=["replaced"])
    with pytest.raises(ShapeError, match="at least one batch"):
        robustness(model, [])
    with pytest.raises(ShapeError, match="'audio': expected a floating tensor or word ids"):
        robustness(fusion.joint_model(), [{**fusion.batch(), "audio": None}])


def test_batches_that_can_be_read_only_once_raise():
    model = weighted_model(audio=1.0, image=0.0)
    batches = labeled_batches(model)
    with pytest.raises(ConfigError, match="batches that can be read several times, got generator"):
        robustness(model, (batch for batch in batches))
