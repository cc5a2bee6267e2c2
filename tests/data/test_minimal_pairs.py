"""Minimal pairs of scenes: captions of the same words, each true of its own image only."""

import re

import numpy as np
import pytest
import torch

from equipoise.data import load_dataset
from equipoise.data.sets.minimal_pairs import KINDS
from equipoise.data.sets.scene_questions import KNOWN, PLURALS
from equipoise.data.sets.scene_rendering import render_scene
from equipoise.data.sets.text_codes import decode_text
from equipoise.errors import ConfigError

SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
ROLES = {
    "color": r"a (\w+) (\w+) and a (\w+) (\w+)", "order": r"a (\w+) (\w+) and a (\w+) (\w+)",
    "left": r"a (\w+) (\w+) left of a (\w+) (\w+)", "above": r"a (\w+) (\w+) above a (\w+) (\w+)",
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load_dataset("minimal_pairs", pairs=24, kinds=tuple(KINDS))


def is_true(kind, caption, things):
    """Whether a caption is true of an image, read off its objects."""
    if kind == "count":
        few, one, many, two, shapes = re.fullmatch(r"(\w+) (\w+) and (\w+) (\w+) (\w+)", caption).groups()
        counts = {color: sum((thing.color, thing.shape) == (color, SINGULAR[shapes]) for thing in things)
                  for color in (one, two)}  # fmt: skip
        return counts == {one: ("zero", "one", "two").index(few), two: ("zero", "one", "two").index(many)}
    if kind == "state":
        named = re.findall(r"the (\w+) (\w+) is (\w+)", caption)
        return {(thing.color, thing.shape, "moving" if thing.moving else "parked") for thing in things} == set(named)
    a, b, c, d = re.fullmatch(ROLES[kind], caption).groups()
    objects = {(thing.color, thing.shape): thing for thing in things}
    if set(objects) != {(a, b), (c, d)}:
        return False
    one, two = objects[a, b].center, objects[c, d].center
    return one[1] < two[1] if kind == "above" else one[0] < two[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_caption_is_true_of_its_own_image_only(data, kind):
    pairs = [pair for pair in data.pairs("test") if pair.kind == kind]
    assert len(pairs) == 24
    for pair in pairs:
        assert sorted(pair.captions[0].split()) == sorted(pair.captions[1].split())
        truth = [[is_true(kind, caption, things) for caption in pair.captions] for things in pair.things]
        assert truth == [[True, False], [False, True]]
        assert {(thing.color, thing.shape) for things in pair.things for thing in things} <= set(KNOWN)
    # Which caption comes first tells nothing.
    assert len({pair.captions for pair in pairs}) > 12


@pytest.mark.parametrize("kind", KINDS)
def test_images_differ_in_the_named_property_only(data, kind):
    for pair in data.pairs("val"):
        if pair.kind != kind:
            continue
        first, second = pair.things
        places = [sorted((thing.x, thing.y, thing.side) for thing in things) for things in pair.things]
        assert places[0] == places[1]
        if kind in ("left", "above", "order"):
            assert [(thing.color, thing.shape) for thing in first] == [(thing.color, thing.shape) for thing in second]
        else:
            assert [thing.shape for thing in first] == [thing.shape for thing in second]
        if kind in ("color", "count"):
            # The same pixels belong to the same objects.
            owners = [render_scene(things, 48)[1] for things in pair.things]
            assert np.array_equal(*owners)
        if kind == "state":
            assert [thing.color for thing in first] == [thing.color for thing in second]
            assert all(thing.box[0] >= 0 for things in pair.things for thing in things)


def test_samples_are_the_images_and_captions_of_the_pairs(data):
    test = data.test
    assert len(test) == 2 * 24 * len(KINDS)
    assert test.target.tolist() == [0, 1] * 24 * len(KINDS)
    for index in (0, 51, 130):
        pair = data.pair("test", index)
        for one in (0, 1):
            words = decode_text(test.inputs["text"][2 * index + one].tolist())
            assert words == f"describe {pair.captions[one]}"
            picture = render_scene(pair.things[one], 48, (pair.light, pair.light, pair.light - 4))[0]
            assert np.array_equal(test.inputs["image"][2 * index + one].numpy(), picture)
    batch = data.batch("test", torch.arange(4), seed=0, epoch=0, train=False)
    assert batch["image"].dtype == torch.float32
    whole = data.batch("train", torch.arange(len(data.train)), seed=0, epoch=0, train=True)["image"]
    assert abs(float(whole.mean())) < 1e-4


def test_pairs_depend_on_the_seed_and_not_on_the_other_kinds(data):
    again = load_dataset("minimal_pairs", pairs=2, kinds="left")
    assert again.pairs("test") == [pair for pair in data.pairs("test") if pair.kind == "left"][:2]
    other = load_dataset("minimal_pairs", pairs=2, kinds="left", seed=1)
    assert other.pairs("test") != again.pairs("test")
    assert again.pairs("val") != again.pairs("test")
    assert load_dataset("minimal_pairs", pairs=2, kinds="left", level=3).pairs("test") != again.pairs("test")
    assert load_dataset("minimal_pairs", pairs=1).pair_kinds == ("color", "left", "above", "count", "state")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "expected pairs >= 1, got pairs = 0"),
        ({"kinds": ("color", "size")}, "expected a known kind, got 'size'"),
        ({"kinds": ()}, "expected one or more different kinds"),
        ({"kinds": ("left", "left")}, "expected one or more different kinds"),
        ({"level": 1}, "expected a known level, got '1'"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset("minimal_pairs", **options)
    with pytest.raises(ConfigError, match="expected a known split, got 'all'"):
        load_dataset("minimal_pairs", pairs=1, kinds="left").pairs("all")
