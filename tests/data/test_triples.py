"""The triples data set: written digits and misspellings, single items, scenes and their correspondence."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data import load_dataset
from equipoise.data.counter_rng import CounterRNG
from equipoise.data.sets.digit_spelling import FORMS, LETTERS, letter_ids, misspell, spelled_digits
from equipoise.errors import ConfigError

ITEMS = 5
ROWS = torch.arange(11)


@pytest.fixture(scope="module")
def single():
    return load_dataset("triples")


@pytest.fixture(scope="module")
def scenes():
    return load_dataset("triples", items=ITEMS)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def decode_word(ids):
    return "".join(LETTERS[number - 1] for number in ids.tolist() if number)


def batch_of(data, split, **options):
    return data.batch(split, ROWS, **{"seed": 0, "epoch": 0, "train": False, **options})


def test_every_word_has_one_digit():
    words = [(decode_word(ids), digit) for digit, forms in enumerate(spelled_digits()) for ids in forms]
    assert len(words) == 10 * len(FORMS)
    assert {"seven", "sept", "sieben", "siete", "vii", "7"} == {text for text, digit in words if digit == 7}
    assert len(set(words)) == len({text for text, _ in words})


def test_words_that_are_too_long_raise():
    with pytest.raises(ConfigError, match=r"letter_ids: expected at most 6 letters of 'abc.*', got 'sixteen'"):
        letter_ids(["six", "sixteen"])
    with pytest.raises(ConfigError, match="got 'f\u00fcnf'"):
        letter_ids(["f\u00fcnf"])


def expected_slips(ids, slips, uniform, letters):
    """Returns the letters and positions after misspelling, letter by letter."""
    placed = []
    for index, number in enumerate(ids):
        if number == 0 or (index and slips / 3 <= uniform[index] < 2 * slips / 3):
            continue
        if uniform[index] < slips / 3:
            number = 1 + int(letters[index] * len(LETTERS))
        late = 2 * slips / 3 <= uniform[index] < slips
        placed.append((index + 1.5 * late, number))
    result = [number for _, number in sorted(placed)]
    return result + [0] * (len(ids) - len(result))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), slips=st.floats(0, 1))
def test_misspellings_against_a_loop(seed, slips):
    ids = spelled_digits().flatten(0, 1)
    draw = CounterRNG(seed, 0, torch.arange(len(ids)))
    result = misspell(ids, slips, draw)
    uniform, letters = draw.uniform("slips", ids.shape[1]), draw.uniform("letters", ids.shape[1])
    for row, got in enumerate(result.tolist()):
        assert got == expected_slips(ids[row].tolist(), slips, uniform[row].tolist(), letters[row].tolist())
        length = sum(number > 0 for number in got)
        assert 1 <= length <= len(decode_word(ids[row]))
        assert got[length:] == [0] * (len(got) - length)


def test_misspelling_rate():
    """Of "seven": a letter is lost for a third of all slips, but for the first one."""
    count, slips = 6000, 0.3
    result = misspell(letter_ids(["seven"] * count), slips, CounterRNG(0, 0, torch.arange(count)))
    lost = 5 - (result > 0).sum(dim=1).float()
    assert abs(float(lost.mean()) - 4 * slips / 3) < 5 * math.sqrt(4 * 0.1 * 0.9 / count)
    exact = sum(decode_word(ids) == "seven" for ids in result) / count
    # All letters are right, some of them replaced by themselves; or the last ones are all late, which restores the
    # word.
    late, right = slips / 3, 1 - slips + slips / 3 / len(LETTERS)
    expected = sum((right + slips / 3) * right ** (4 - behind) * late**behind for behind in range(5)) + late**5
    assert abs(exact - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


def test_single_items_are_the_bundled_digits(single, digits):
    assert single.shapes == {"audio": (64, 40), "image": (1, 8, 8), "text": (6,)}
    assert (single.task, single.num_outputs, single.vocabulary) == ("classification", 10, {"text": 37})
    for split in ("train", "val", "test"):
        mine, theirs = single.split(split), digits.split(split)
        assert torch.equal(mine.target, theirs.target)
        assert all(torch.equal(mine.inputs[name], theirs.inputs[name]) for name in digits.names)
        meant = spelled_digits()[mine.target]
        assert bool((mine.inputs["text"][:, None] == meant).all(dim=2).any(dim=1).all())
    forms = Counter(decode_word(ids) for ids in single.train.inputs["text"])
    assert len(forms) == len({decode_word(ids) for forms in spelled_digits() for ids in forms})


def test_modalities_of_a_scene_have_equal_digits(scenes, digits):
    for split in ("train", "val", "test"):
        held_out, pool = scenes.split(split), digits.split(split)
        assert held_out.target.shape == (len(pool), 3, ITEMS)
        ordered = held_out.target.sort(dim=2).values
        assert torch.equal(ordered[:, 0], ordered[:, 1])
        assert torch.equal(ordered[:, 0], ordered[:, 2])
        assert bool((ordered.diff(dim=2) > 0).all())
        # Of this split's own images and recordings, and of the digit that the target says.
        for index, name in enumerate(digits.names):
            known = {bytes(row.numpy()): int(label) for row, label in zip(pool.inputs[name], pool.target, strict=True)}
            for row in (0, 1, len(pool) - 1):
                for item in range(ITEMS):
                    shown = bytes(held_out.inputs[name][row, item].contiguous().numpy())
                    assert known[shown] == held_out.target[row, index, item]
        meant = spelled_digits()[held_out.target[:, 2]]
        assert bool((held_out.inputs["text"][:, :, None] == meant).all(dim=3).any(dim=2).all())


def test_item_orders_differ_between_modalities(scenes):
    target = scenes.train.target
    for one, other in ((0, 1), (1, 2), (0, 2)):
        same = float((target[:, one] == target[:, other]).float().mean())
        assert abs(same - 1 / ITEMS) < 5 * math.sqrt(0.16 / target[:, 0].numel()) * 1.5
    shown = target[:, 0].flatten().bincount(minlength=10) / len(target)
    assert float((shown - ITEMS / 10).abs().max()) < 5 * math.sqrt(0.25 / len(target))


def test_batches_are_deterministic_and_training_noise_varies(scenes):
    for name in scenes.names:
        assert torch.equal(batch_of(scenes, "test")[name], batch_of(scenes, "test", seed=3, epoch=2)[name])
        first, again = (batch_of(scenes, "train", train=True, epoch=epoch)[name] for epoch in (0, 1))
        assert not torch.equal(first, again)
    full = batch_of(scenes, "val")
    part = scenes.batch("val", ROWS[4:7], seed=0, epoch=0, train=False)
    assert all(torch.equal(full[name][4:7], part[name]) for name in full)


def test_items_have_independent_noise(scenes):
    batch = batch_of(scenes, "test")
    noise = batch["audio"] * math.sqrt(5) - scenes.test.inputs["audio"][ROWS]
    flat = noise.flatten(0, 1).flatten(1)
    assert float(torch.corrcoef(flat).fill_diagonal_(0).abs().max()) < 6 / math.sqrt(flat.shape[1])


def test_noise_of_texts_is_padding(single):
    assert single.noise["text"] == (0.0, 0.0)


def test_letters_as_vectors(single):
    data = load_dataset("triples", letters="vectors")
    assert data.shapes == {**single.shapes, "text": (6, len(LETTERS))}
    assert data.vocabulary == {}
    ids, rows = batch_of(single, "train", train=True)["text"], batch_of(data, "train", train=True)["text"]
    assert torch.equal(rows.sum(dim=2), (ids > 0).float())
    assert torch.equal(rows.argmax(dim=2)[ids > 0], ids[ids > 0] - 1)
    # A 1 among 36 for every letter of a clean word: the deviation of a coin.
    part = float((single.train.inputs["text"] > 0).float().mean()) / len(LETTERS)
    assert data.noise["text"] == pytest.approx((part, math.sqrt(part * (1 - part))))
    assert batch_of(load_dataset("triples", items=2, letters="vectors"), "val")["text"].shape == (len(ROWS), 2, 6, 36)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": 0}, r"Triples: expected 1 <= items <= 10, all different, got items = 0"),
        ({"items": 11}, r"got items = 11"),
        ({"slips": 1.5}, r"Triples: expected 0 <= slips <= 1, got slips = 1\.5"),
        ({"slips": math.nan}, r"got slips = nan"),
        ({"letters": "vector"}, r"Triples: expected a known letters, got 'vector'\. Did you mean 'vectors'"),
        ({"audio_noise": -1.0}, r"expected a finite audio_noise >= 0, got audio_noise = -1\.0"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset("triples", **options)


def test_data_card_matches_the_data(scenes):
    card = (Path(__file__).parents[2] / "docs/data/triples.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), {})
    for name, words in FORMS.items():
        assert f"| {name} | {' | '.join(words.split())} |" in card
    result = batch_of(load_dataset("triples", items=4), "val")
    for row in range(3):
        slipped = ", ".join(decode_word(ids) for ids in result["text"][row])
        assert slipped in card
