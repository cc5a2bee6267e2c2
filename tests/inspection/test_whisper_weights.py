"""Pretrained Whisper: the figures of docs/whisper.md on a few strings. Weights are read from EQUIPOISE_MODELS."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import equipoise as eq

MODEL = Path(os.environ.get("EQUIPOISE_MODELS", "")) / "whisper-tiny.en"
DATA = Path(os.environ.get("EQUIPOISE_DATA", "")) / "fsdd" / "recordings"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "whisper_listens.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="EQUIPOISE_MODELS has no whisper-tiny.en"),
    pytest.mark.skipif(not DATA.is_dir(), reason="EQUIPOISE_DATA has no fsdd/recordings"),
]


@pytest.fixture(scope="module")
def case():
    import sys

    spec = importlib.util.spec_from_file_location("whisper_listens", SCRIPT)
    script = sys.modules["whisper_listens"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    whisper, strings = script.Whisper(MODEL), script.spoken_strings(DATA, 6)
    return script, whisper, strings, [whisper.encode(one.sound) for one in strings]


def test_strings_are_their_recordings(case):
    script, _, strings, _ = case
    for one, other in zip(strings, script.partners(strings), strict=True):
        assert all(a != b for a, b in zip(one.digits, strings[other].digits, strict=True))
        assert one.spans[-1][1] == pytest.approx(len(one.sound) / script.FRAME, abs=1)
        assert [int((one.labels == part).sum()) for part in range(4)] == [end - start for start, end in one.spans]


def test_own_recording_is_used(case):
    script, whisper, strings, encoded = case
    rows = script.conditions(whisper, strings, encoded)
    for name in ("another", "silence", "noise", "hidden"):
        assert rows["own"]["mean"] > rows[name]["mean"] + 2
    assert rows["silence"]["no_speech"]["above 0.6"] == 1


def test_words_attend_to_their_digits(case):
    script, whisper, strings, encoded = case
    result = script.attention(whisper, strings, encoded)
    assert result["most attended digit is the own one"]["mean"] > 0.9
    assert result["aei"] > 10
    assert np.allclose(np.sum(result["share by word and part"], axis=1), 1)


def test_hidden_digit_changes_its_word_only(case):
    script, whisper, strings, encoded = case
    plain = whisper.word_likelihoods(encoded[1], strings[1].text)
    options = {"modality": strings[1].labels, "names": script.PARTS, "layers": script.CROSS}
    with eq.steer(whisper.model, **options, third=-8.0):
        steered = whisper.word_likelihoods(encoded[1], strings[1].text)
    drop = plain - steered
    assert drop[2] > 2
    assert np.abs(np.delete(drop, 2)).max() < 1
    with torch.no_grad():
        assert np.array_equal(whisper.word_likelihoods(encoded[1], strings[1].text), plain)
