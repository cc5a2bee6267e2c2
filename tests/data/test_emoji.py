"""The bundled emoji: what the data card says of splits, captions and targets; pictures of other origin."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.data import load_dataset
from equipoise.data.counter_rng import CounterRNG
from equipoise.data.image_augmentation import color_jitter, load_square_image, random_translation
from equipoise.data.sets import emoji as module
from equipoise.data.sets.emoji import ATLAS, ATLAS_SHA256, LENGTH, Emoji
from equipoise.data.sets.word_vocabulary import split_words
from equipoise.errors import DataError
from helpers.tolerance import TOL

# The bundled file spells "colour".
FAMILIES = {"body", "cat", "clock", "colour", "face", "family", "people"}


@pytest.fixture(scope="module")
def emoji():
    return load_dataset("emoji")


def test_checksum_of_emoji():
    assert hashlib.sha256(ATLAS.read_bytes()).hexdigest() == ATLAS_SHA256
    assert ATLAS.stat().st_size < 1e6
    licenses = ATLAS.with_name("emoji_LICENSES.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE" in licenses
    assert "UNICODE INC." in licenses


def test_sizes_and_shapes(emoji):
    assert (len(emoji.train), len(emoji.val), len(emoji.test)) == (2936, 183, 276)
    assert emoji.shapes == {"image": (3, 32, 32), "text": (LENGTH,)}
    assert emoji.vocabulary == {"text": len(emoji.words)}
    assert len(emoji.items) == len(emoji.pictures) == 3395
    values = emoji.train.inputs["image"]
    torch.testing.assert_close(values.mean(), torch.tensor(0.0), **TOL[torch.float32])
    torch.testing.assert_close(values.std(correction=0), torch.tensor(1.0), **TOL[torch.float32])


@pytest.mark.parametrize("name", ["val", "test"])
def test_held_out_combinations_consist_of_training_parts(emoji, name):
    items, taught = emoji.split_items(name), emoji.split_items("train")
    parts = Counter(part for item in taught for part in set(item.parts))
    message = {word for item in taught for word in split_words(item.name)}
    names = {item.name for item in taught}
    for item in items:
        assert len(item.parts) >= 2
        assert all(parts[part] >= 1 for part in item.parts), item.name
        assert set(split_words(item.name)) <= message
        assert item.name not in names
        assert not emoji.words.unseen(item.name)
    assert set(emoji.groups(name)) == FAMILIES


def test_parts_are_words_of_the_name(emoji):
    for item in emoji.items:
        own = Counter(split_words(item.name))
        assert not Counter(split_words(" ".join(item.parts))) - own, item


def test_held_out_images_are_not_in_training(emoji):
    seen = {picture.numpy().tobytes() for picture in emoji.pictures[emoji._rows["train"]]}
    for name in ("val", "test"):
        assert not seen & {picture.numpy().tobytes() for picture in emoji.pictures[emoji._rows[name]]}


def test_equal_images_have_equal_targets_and_names_are_unique(emoji):
    by_picture = {}
    for which in ("train", "val", "test"):
        for index, target in zip(emoji._rows[which].tolist(), emoji.split(which).target.tolist(), strict=True):
            by_picture.setdefault(emoji.pictures[index].numpy().tobytes(), set()).add(target)
    assert {len(targets) for targets in by_picture.values()} == {1}
    # Two keycaps have names of the same words, and different pictures.
    assert len({next(iter(t)) for t in by_picture.values()}) == len(by_picture) - 1 == emoji.num_outputs == 3380
    by_words = {}
    for which in ("train", "val", "test"):
        for item, target in zip(emoji.split_items(which), emoji.split(which).target.tolist(), strict=True):
            by_words.setdefault(tuple(split_words(item.name)), set()).add(target)
    assert {len(targets) for targets in by_words.values()} == {1}
    flags = [item.name for item in emoji.items if item.name in ("flag: Norway", "flag: Svalbard & Jan Mayen")]
    targets = [emoji.train.target[[i.name for i in emoji.split_items("train")].index(flag)] for flag in flags]
    assert targets[0] == targets[1]


def test_red_heart_pixels_are_red(emoji):
    index = [item.name for item in emoji.items].index("red heart")
    red, green, blue = emoji.pictures[index, 14, 16].tolist()
    assert red > 180 > 100 > max(green, blue)
    assert emoji.items[index].text.startswith("\N{HEAVY BLACK HEART}")


def test_evaluation_batches_are_the_stored_ones(emoji):
    index = torch.tensor([5, 0, 7])
    one = emoji.batch("test", index, seed=0, epoch=0, train=False)
    other = emoji.batch("test", index, seed=3, epoch=9, train=False)
    assert set(one) == {"image", "text", "target", "index"}
    for name, values in one.items():
        assert torch.equal(values, other[name])
    assert torch.equal(one["text"], emoji.words.encode([emoji.split_items("test")[index].name for index in (5, 0, 7)]))


def test_training_batches_repeat_and_differ_by_epoch(emoji):
    index = torch.arange(40)
    one, again = (emoji.batch("train", index, seed=1, epoch=2, train=True) for _ in range(2))
    for name, values in one.items():
        assert torch.equal(values, again[name])
    later = emoji.batch("train", index, seed=1, epoch=3, train=True)
    assert not torch.equal(one["text"], later["text"])
    assert not torch.equal(one["image"], later["image"])
    half = emoji.batch("train", index[17:], seed=1, epoch=2, train=True)
    assert torch.equal(half["text"], one["text"][17:])
    assert torch.equal(half["target"], one["target"][17:])


def test_equal_captions_of_a_batch_have_equal_targets(emoji, monkeypatch):
    monkeypatch.setattr(module, "SPELLED", 0.0)
    batch = emoji.batch("train", torch.arange(len(emoji.train)), seed=0, epoch=0, train=True)
    targets = {}
    for text, target in zip(batch["text"].tolist(), batch["target"].tolist(), strict=True):
        targets.setdefault(tuple(text), set()).add(target)
    shared = [text for text, count in Counter(map(tuple, batch["text"].tolist())).items() if count > 1]
    assert len(shared) > 20
    assert all(len(targets[text]) == 1 for text in shared)
    alone = (batch["target"] != emoji.train.target).double()
    assert 0.08 < float(alone.mean()) < 0.12


def test_captions_are_name_keyword_or_both(emoji, monkeypatch):
    monkeypatch.setattr(module, "SPELLED", 0.0)
    index = torch.arange(300, 700)
    batch = emoji.batch("train", index, seed=0, epoch=0, train=True)
    words = {number: word for word, number in emoji.words.words.items()}
    kinds = Counter()
    for position, row in zip(index.tolist(), batch["text"].tolist(), strict=True):
        item, message = emoji.split_items("train")[position], [words[number] for number in row if number]
        allowed = {"name": split_words(item.name)}
        allowed |= {f"alone {word}": split_words(word) for word in item.keywords}
        allowed |= {f"both {word}": split_words(f"{item.name} {word}") for word in item.keywords}
        kinds[next(kind for kind, expected in allowed.items() if expected[:LENGTH] == message).split()[0]] += 1
    assert kinds["name"] > kinds["both"] > kinds["alone"] > 0


def test_keyword_equal_to_a_name_refers_to_that_image(emoji):
    names = {
        item.name: int(target) for item, target in zip(emoji.split_items("train"), emoji.train.target, strict=True)
    }
    assert "face" in emoji.items[0].keywords
    assert emoji._keywords["face"] >= emoji.num_outputs
    assert emoji._keywords["dog"] == names["dog"]
    held = {tuple(split_words(item.name)) for name in ("val", "test") for item in emoji.split_items(name)}
    assert not held & {tuple(split_words(word)) for word in emoji._keywords}


def test_normalized_words(emoji):
    batch = emoji.batch("train", torch.arange(500), seed=0, epoch=0, train=True)
    spelled = (batch["text"] > len(emoji.words.words)).any(dim=1).double().mean()
    assert 0.1 < float(spelled) < 0.5


def test_parts_of_combinations_are_separate_texts(emoji):
    result = emoji.combinations("test")
    items = emoji.split_items("test")
    assert result.modality == "text"
    assert result.rows.tolist() == list(range(276))
    assert result.present.sum(dim=1).tolist() == [len(item.parts) for item in items]
    index = [item.name for item in items].index("blue heart")
    assert torch.equal(result.parts[index, :2], emoji.words.encode(["blue", "heart"]))
    assert not result.parts[~result.present].any()


def test_data_card_code_output():
    card = (Path(__file__).parents[2] / "docs/data/emoji.md").read_text(encoding="utf-8")
    result = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, result)
    for way, words in (
        (result["image_to_name"], "nearest training image's name"),
        (result["name_to_image"], "name to image"),
    ):
        assert f"{words} | {100 * way.recall[1]:.1f} | {100 * way.recall[5]:.1f} |" in card
        assert f"| chance level | {100 * way.chance[1]:.1f} | {100 * way.chance[5]:.1f} |" in card


def test_damaged_file_raises(tmp_path, monkeypatch):
    broken = tmp_path / "emoji.npz"
    broken.write_bytes(ATLAS.read_bytes()[:5000])
    monkeypatch.setattr(module, "ATLAS", broken)
    with pytest.raises(DataError, match=r"emoji 'emoji\.npz': expected the file that comes with the package.*Install"):
        Emoji()


def test_bundled_image_is_read_unchanged(emoji, tmp_path):
    picture = emoji.pictures[100]
    path = tmp_path / "own.png"
    Image.fromarray(picture.numpy()).save(path)
    assert torch.equal(emoji.read(path), picture)
    result = emoji.images(picture[None])
    assert result.shape == (1, 3, 32, 32)
    torch.testing.assert_close(result[0], emoji.train.inputs["image"][emoji._rows["train"].tolist().index(100)])


def test_transparency_becomes_white_and_images_are_padded_to_squares():
    colors = np.zeros((20, 40, 4), dtype=np.uint8)
    colors[:, :20] = (255, 0, 0, 255)
    result = load_square_image(Image.fromarray(colors), 8)
    assert result.shape == (8, 8, 3)
    # A border of ten rows is two of eight; rows beside an edge are a mixture.
    assert result[0].unique().tolist() == [255]
    red, green, blue = result[4, 1].tolist()
    assert red > 250 > 20 > max(green, blue)
    assert result[4, 6].min() > 240


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "RGBa", "CMYK", "YCbCr"])
def test_common_image_modes(mode):
    result = load_square_image(Image.new("RGB", (16, 16), "white").convert(mode), 4)
    assert result.unique().tolist() == [255]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (16, 16)), r"image: expected an image of 8 or 16 bits a color, got mode F, .*\. Convert it"),
        (Image.new("RGB", (16, 7)), "at least 8 x 8 pixels, .* 4 times the other, got width x height = 16 x 7"),
        (Image.new("RGB", (8, 33)), r"got width x height = 8 x 33\. Crop it to its subject"),
    ],
)  # fmt: skip
def test_invalid_image_mode_or_size_raises(image, message):
    with pytest.raises(DataError, match=message):
        load_square_image(image, 32)


def test_non_image_files_raise(tmp_path):
    with pytest.raises(DataError, match=r"image '.*none\.png': expected an image, got no such file"):
        load_square_image(tmp_path / "none.png", 32)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match="expected an image, as PNG, JPEG or WebP, got a file of another kind"):
        load_square_image(tmp_path / "text.png", 32)
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    with pytest.raises(DataError, match=r"expected a complete image.*Is the file truncated"):
        load_square_image(tmp_path / "part.png", 32)


def test_exif_orientation_is_applied(tmp_path):
    image, turned = Image.new("RGB", (16, 16), "white"), Image.Exif()
    image.paste("black", (0, 0, 16, 8))
    turned[0x0112] = 6
    image.save(tmp_path / "held.png", exif=turned)
    result = load_square_image(tmp_path / "held.png", 16)
    assert result[:, :7].unique().tolist() == [255]
    assert result[:, 9:].unique().tolist() == [0]


def test_decompression_bomb_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (16, 16)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"expected an image of at most .* pixels, got .*decompression bomb"):
        load_square_image(tmp_path / "bomb.png", 32)


def test_random_shift_moves_the_whole_image():
    pictures = torch.arange(2 * 3 * 5 * 7).double().reshape(2, 3, 5, 7)
    draw = CounterRNG(0, 0, torch.arange(2))
    steps = (draw.uniform("move", 2) * 5).long() - 2
    result = random_translation(pictures, draw, pixels=2, fill=-1.0)
    for sample in range(2):
        down, right = steps[sample].tolist()
        for row in range(5):
            for column in range(7):
                i, j = row + down, column + right
                own = pictures[sample, :, i, j] if 0 <= i < 5 and 0 <= j < 7 else torch.full((3,), -1.0).double()
                assert torch.equal(result[sample, :, row, column], own)


def test_color_jitter_is_within_limits():
    result = color_jitter(torch.ones(500, 3, 1, 1), CounterRNG(0, 0, torch.arange(500)), gain=0.2, tint=0.1)[..., 0, 0]
    assert 0.7 <= result.min() < 0.75
    assert 1.25 < result.max() <= 1.3
    assert float((result.amax(dim=1) - result.amin(dim=1)).max()) <= 0.2 + 1e-6
