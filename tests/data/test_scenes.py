"""The scenes data set: rendering, questions, held-out combinations, and regions of words."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data import load_dataset
from equipoise.data.sets.scene_questions import (
    HELD_OUT,
    KINDS,
    KNOWN,
    NUMBERS,
    PLURALS,
    SIDES,
    SceneSampler,
    placed_objects,
)
from equipoise.data.sets.scene_rendering import COLORS, PARTS, VEHICLES, SceneObject, patches_of, render_scene
from equipoise.data.sets.scenes import IGNORED, LEVELS, LONGEST, PATCH, SIZE
from equipoise.data.sets.text_codes import WORDS, decode_text, encode_text
from equipoise.errors import ConfigError

SAMPLES = 160
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}


def scenes(level=2, seed=0, samples=SAMPLES):
    return load_dataset("scenes", level=level, samples=samples, seed=seed)


def sample_question(kind, seed, *, new=False, most=3):
    rng = np.random.default_rng(seed)
    result = KINDS[kind](SceneSampler(rng, most, new))
    return placed_objects(result, rng, size=SIZE, sides=(16, 24), step=8, overlap=0.0)


def join_words(words):
    return " ".join(word for word, _ in words)


def expected_answer(things, question):
    """The answer to a question, read off the things, by rules of its own."""
    words = question.split()
    if question.startswith("what color"):
        return next(thing.color for thing in things if thing.shape == words[-1])
    if question.startswith("how many"):
        return NUMBERS[sum(thing.shape == SINGULAR[words[-1]] for thing in things)]
    if question.startswith("is there"):
        return "yes" if any((thing.color, thing.shape) == tuple(words[3:]) for thing in things) else "no"
    if words[0] == "the":
        result = next(thing for thing in things if (thing.color, thing.shape) == tuple(words[1:3]))
        return "moving" if result.moving else "parked"
    if words[2] in SIDES:
        axis, sign = SIDES[words[2]]
        here = next(thing for thing in things if thing.shape == words[-1]).center[axis]
        return next(thing.shape for thing in things if sign * (thing.center[axis] - here) > 0)
    return next(thing.shape for thing in things if thing.color == words[-1])


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "caption"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_answers_are_correct_and_unique(kind, new, seed):
    result = sample_question(kind, seed, new=new)
    question, answer = join_words(result.question), join_words(result.answer)
    assert expected_answer(result.things, question) == answer
    assert expected_answer(tuple(reversed(result.things)), question) == answer
    assert encode_text(f"{question} {answer}")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), new=st.booleans())
def test_captions_list_objects_from_left_to_right(seed, new):
    result = sample_question("caption", seed, new=new)
    across = sorted(result.things, key=lambda thing: thing.center[0])
    assert join_words(result.answer) == " and ".join(f"a {thing.color} {thing.shape}" for thing in across)
    for word, where in result.answer:
        assert all(word in (result.things[index].color, result.things[index].shape) for index in where)


@pytest.mark.parametrize("level", LEVELS)
def test_objects_are_inside_and_do_not_overlap(level):
    data = scenes(level)
    for index in range(SAMPLES):
        things = data.things("train", index)
        assert 1 <= len(things) <= LEVELS[level].most
        owner = np.full((SIZE, SIZE), -1)
        for thing in things:
            left, top, right, bottom = thing.box
            assert left >= 0 <= top
            assert max(right, bottom) <= SIZE
            alone = render_scene([thing], SIZE)[1] == 0
            if LEVELS[level].overlap == 0:
                assert not (alone & (owner == 0)).any()
            owner[alone] = 0


def test_held_out_combinations_are_in_the_test_split_only():
    assert len(KNOWN) + len(HELD_OUT) == len(COLORS) * len(PARTS)
    data = scenes()
    for split in ("train", "val"):
        pairs = {(t.color, t.shape) for i in range(len(data.split(split))) for t in data.things(split, i)}
        assert pairs <= set(KNOWN)
        assert not data.new(split).any()
    assert {color for color, _ in KNOWN} == set(COLORS)
    assert Counter(shape for _, shape in HELD_OUT) == dict.fromkeys(PARTS, 1)
    new = data.new("test")
    assert 0 < int(new.sum()) < len(new)
    for index in new.nonzero()[:, 0].tolist():
        held = [(t.color, t.shape) in HELD_OUT for t in data.things("test", index)]
        text = " ".join(data.words("test", index))
        assert any(held) or any(f"{c} {s}" in text for c, s in HELD_OUT) or "how many" in text
    for split in ("train", "val"):
        for index in range(len(data.split(split))):
            assert not any(f"{c} {s}" in " ".join(data.words(split, index)) for c, s in HELD_OUT)


def test_answers_are_balanced():
    """Without the image, the answer cannot be guessed better than from the type of the question."""
    for kind, most in (("existence", 0.5), ("state", 0.5), ("count", 0.25)):
        counts = Counter(
            join_words(KINDS[kind](SceneSampler(np.random.default_rng(seed), 3)).answer) for seed in range(400)
        )
        assert max(counts.values()) / 400 < most + 0.1
    result = [KINDS["color"](SceneSampler(np.random.default_rng(seed), 3)) for seed in range(800)]
    cars = Counter(join_words(part.answer) for part in result if part.question[-1][0] == "car")
    assert set(cars) == {color for color, shape in KNOWN if shape == "car"}


def test_batches():
    data = scenes()
    batch = data.batch("train", torch.arange(9), seed=0, epoch=0, train=True)
    assert batch["image"].shape == (9, 3, SIZE, SIZE)
    assert batch["image"].dtype == torch.float32
    assert batch["text"].shape == batch["labels"].shape == (9, LONGEST)
    assert data.vocabulary["text"] == len(WORDS) > int(batch["text"].max())
    for index in range(9):
        text, labels = batch["text"][index], batch["labels"][index]
        counted = labels != IGNORED
        assert torch.equal(labels[counted], text[counted])
        caption = data.kinds("train")[index] == "caption"
        assert WORDS[text[0]] == "<image>"
        assert int(counted.sum()) == 1 if not caption else WORDS[labels[counted][-1]] == "<end>"
        # Nothing but padding stands behind what is predicted.
        last = int(counted.nonzero().max())
        assert set(text[last + 1 :].tolist()) <= {0}
        assert int(batch["target"][index]) == (IGNORED if caption else int(labels[counted][0]))


def test_scenes_depend_on_seed_only():
    one, other = scenes(seed=3), scenes(seed=4)
    from equipoise.data.sets.scenes import render_split

    again = render_split.__wrapped__("train", SAMPLES, 2, 3)
    assert torch.equal(one.train.inputs["image"], again.pictures)
    assert torch.equal(one.train.inputs["text"], again.text)
    assert not torch.equal(one.train.inputs["image"], other.train.inputs["image"])
    longer = render_split("train", 2 * SAMPLES, 2, 3)
    assert torch.equal(longer.pictures[:SAMPLES], again.pictures)
    index = torch.tensor([5, 11])
    fixed = [one.batch("test", index % 5, seed=s, epoch=e, train=False)["image"] for s, e in ((0, 0), (1, 2))]
    assert torch.equal(*fixed)
    fresh = [one.batch("train", index, seed=0, epoch=e, train=True)["image"] for e in (0, 1)]
    assert not torch.equal(*fresh)


def test_regions_match_changed_pixels():
    """A thing's pixels are those that are not what they are without it; its patches are those that hold one."""
    data = scenes(samples=128)
    checked = 0
    for index in range(32):
        things = data.things("train", index)
        regions = data.regions("train", torch.tensor([index]))[0]
        for word, region in zip(data.words("train", index), regions, strict=False):
            if word in ("parked", "moving", "yes", "no", *NUMBERS) or not region.any():
                continue
            named = [n for n, t in enumerate(things) if word in (t.color, t.shape, PLURALS[t.shape])]
            assert named
            if len(named) > 1:
                continue
            without = [thing for n, thing in enumerate(things) if n != named[0]]
            changed = (render_scene(things, SIZE)[0].astype(int) != render_scene(without, SIZE)[0]).any(axis=0)
            touched = changed.reshape(SIZE // PATCH, PATCH, SIZE // PATCH, PATCH).any(axis=(1, 3)).reshape(-1)
            result = region.numpy()
            assert not (result & ~touched).any()
            # Between the patches with a pixel that is all its own, and those with one that it touches.
            pure = (render_scene(things, SIZE)[0].transpose(1, 2, 0) == COLORS[things[named[0]].color]).all(
                axis=2
            ) & changed
            assert not (patches_of(np.where(pure, 0, -1), [0], PATCH) & ~result).any()
            checked += 1
    assert checked > 15


def test_words_without_object_have_no_region():
    data = scenes()
    for index in range(SAMPLES):
        words = data.words("train", index)
        regions = data.regions("train", torch.tensor([index]))[0]
        if words[1:3] == ["is", "there"] and words[-1] == "no":
            assert not regions.any()
        for word, region in zip(words, regions, strict=False):
            if word in ("<image>", "what", "is", "a", "and", "the", "describe", "<end>"):
                assert not region.any()
        covered = data.covered("train", torch.tensor([index]))[0]
        assert not (regions & ~covered).any()


def test_front_object_covers_its_pixels():
    picture, owner = render_scene([SceneObject("red", "square", 2, 2, 10), SceneObject("blue", "square", 6, 2, 10)], 24)
    assert owner[6, 4] == 0
    assert owner[6, 9] == 1
    assert picture[:, 6, 9].tolist() == list(COLORS["blue"])
    assert patches_of(owner, [0], 6).tolist() == [True, True] + [False] * 2 + [True, True] + [False] * 10


@pytest.mark.parametrize("shape", PARTS)
def test_shapes_have_their_color(shape):
    picture, owner = render_scene([SceneObject("purple", shape, 4, 4, 16)], 24)
    own = (picture.transpose(1, 2, 0) == COLORS["purple"]).all(axis=2)
    assert own[owner == 0].mean() > 0.25
    assert not own[owner != 0].any()


def test_moving_vehicles_have_motion_lines():
    for shape in VEHICLES:
        still, fast = (
            render_scene([SceneObject("red", shape, 12, 4, 16, moving)], 32)[1] == 0 for moving in (False, True)
        )
        behind = fast & ~still
        assert behind.any()
        assert behind.nonzero()[1].max() < 12 <= still.nonzero()[1].min()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 4}, r"Scenes: expected a known level, got '4'\. Choose one of: 1, 2, 3"),
        ({"samples": 100}, r"Scenes: expected samples >= 128, got samples = 100"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset("scenes", **options)


def test_unsupported_requests_raise():
    data = scenes()
    with pytest.raises(ConfigError, match=r"Scenes: expected a known split, got 'tests'\. Did you mean 'test'"):
        data.kinds("tests")
    with pytest.raises(ConfigError, match=r"scenes text: expected at least one word, got ' \? '"):
        encode_text(" ? ")
    with pytest.raises(ConfigError, match="scenes text: expected a known word, got 'lorry'"):
        encode_text("what color is the lorry")
    assert decode_text(encode_text("What is left of the car?")) == "what is left of the car"


def test_data_card_matches_the_data():
    card = (Path(__file__).parents[2] / "docs/data/scenes.md").read_text()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), {})
    for color, shape in HELD_OUT:
        assert f"{color} {shape}" in card.replace("\n", " ")
    for number, level in LEVELS.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {number} |"))
        assert str(level.most) in row
        assert str(level.noise) in row
        assert all(str(side) in row for side in (level.sides[0], level.sides[-1]))
    assert f"{len(WORDS) - 3} words" in card
