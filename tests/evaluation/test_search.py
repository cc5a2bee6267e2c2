"""The search index: order, ranks, ties and errors; cached embeddings; images in a terminal."""

import os

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from equipoise.data import load_dataset
from equipoise.errors import ConfigError, DataError, ShapeError
from equipoise.evaluation.search import (
    IndexEntry,
    SearchIndex,
    cached_embeddings,
    caption_entries,
    image_entries,
    index_folder,
)
from equipoise.evaluation.search.embedding_cache import NAME
from equipoise.evaluation.search.search_index import check_searchable, embed_entries
from equipoise.evaluation.search.terminal_image import HALF, image_to_blocks
from helpers.search import build_dual_encoder


@pytest.fixture(scope="module")
def emoji():
    return load_dataset("emoji")


@pytest.fixture(scope="module")
def model(emoji):
    return build_dual_encoder(emoji)


@pytest.fixture(scope="module")
def image_index(model, emoji):
    return image_entries(model, emoji)


@pytest.fixture(scope="module")
def caption_index(model, emoji):
    return caption_entries(model, emoji)


def index_with_known_scores(model, emoji, scores, query="red heart"):
    """An index whose cosines with the query are known."""
    (toward,) = embed_entries(model, "text", emoji.words.encode([query]))
    side = torch.zeros_like(toward)
    side[0], side[1] = toward[1], -toward[0]
    side = side / side.norm()
    vectors = torch.stack([score * toward + (1 - score**2) ** 0.5 * side for score in scores])
    return SearchIndex(model, emoji, [IndexEntry(f"entry {n}") for n in range(len(scores))], vectors)


def test_results_are_ranked_with_ties(model, emoji):
    result = index_with_known_scores(model, emoji, [0.1, 0.9, 0.5, 0.9, -0.3, 0.5, 0.5]).search_by_text(
        "red heart", top=4
    )
    assert [hit.entry.name for hit in result.hits] == ["entry 1", "entry 3", "entry 2", "entry 5"]
    assert [hit.rank for hit in result.hits] == [1, 1, 3, 3]
    assert [hit.score for hit in result.hits] == pytest.approx([0.9, 0.9, 0.5, 0.5], abs=1e-5)
    assert (result.tied, result.entries, result.question, result.image) == (1, 7, "red heart", None)
    everything = index_with_known_scores(model, emoji, [0.2, 0.4]).search_by_text("red heart", top=10)
    assert [hit.rank for hit in everything.hits] == [1, 2]
    assert everything.tied == 0


def test_results_are_ordered_by_cosine(image_index, emoji):
    result = image_index.search_by_text("blue book", top=50)
    (query,) = embed_entries(image_index.model, "text", emoji.words.encode(["blue book"]))
    cosines = (image_index.vectors @ query).tolist()
    expected = sorted(range(len(cosines)), key=lambda index: -cosines[index])[:50]
    assert [hit.entry.name for hit in result.hits] == [emoji.items[index].name for index in expected]


def test_image_entries_have_metadata(image_index, emoji):
    assert len(image_index.entries) == 3395
    entry = image_index.entries[[item.name for item in emoji.items].index("blue heart")]
    assert (entry.name, entry.mark, entry.seen) == ("blue heart", "\N{BLUE HEART}", False)
    assert "blue" in entry.keywords
    assert entry.image.shape == (32, 32, 3)
    torch.testing.assert_close(image_index.vectors.norm(dim=1), torch.ones(3395))


def test_captions_are_unique_names_and_keywords(caption_index, emoji):
    names = [entry.name for entry in caption_index.entries]
    assert len(set(names)) == len(names) > 3395 + 1000
    assert names[:3395] == [item.name for item in emoji.items]
    assert all(entry.image is None for entry in caption_index.entries[3395:])


def test_image_query_returns_captions_and_itself(image_index, caption_index, emoji, tmp_path):
    Image.fromarray(emoji.pictures[7].numpy()).save(tmp_path / "own.png")
    result = image_index.search_by_image(tmp_path / "own.png", top=3)
    assert result.hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert emoji.items[7].name in [hit.entry.name for hit in result.hits if hit.rank == 1]
    assert result.question == "own.png"
    assert result.image.shape == (96, 96, 3)
    messages = caption_index.search_by_image(Image.fromarray(emoji.pictures[7].numpy()), top=5)
    assert messages.question == "an image"
    assert len(messages.hits) == 5


def test_unknown_words(image_index):
    result = image_index.search_by_text("bluish hearts", top=1)
    assert result.unseen == ["bluish"]
    with pytest.raises(ConfigError, match="search: expected a known word, got 'qqqq'"):
        image_index.search_by_text("qqqq")


@pytest.mark.parametrize(
    ("text", "top", "kind", "message"),
    [
        ("", 3, ShapeError, "search: expected a text with a word in it, got ''"),
        (" ?! ", 3, ShapeError, "expected a text with a word in it"),
        ("red " * 25, 3, ShapeError, "search: expected a text of at most 24 words, got 25"),
        ("red", 0, ConfigError, "search: expected top >= 1, got top = 0"),
    ],
)
def test_invalid_queries_raise(image_index, text, top, kind, message):
    with pytest.raises(kind, match=message):
        image_index.search_by_text(text, top=top)


def test_image_folder(model, emoji, tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    (tmp_path / "below").mkdir()
    Image.new("RGBA", (20, 20), (0, 0, 255, 128)).save(tmp_path / "below" / "blue.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    index, troubles = index_folder(model, emoji, tmp_path)
    assert [entry.name for entry in index.entries] == [os.path.join("below", "blue.PNG"), "red.png"]
    assert [entry.seen for entry in index.entries] == [None, None]
    assert len(troubles) == 1
    assert "broken.png" in troubles[0]
    assert len(index.search_by_text("red", top=9).hits) == 2


def test_folders_without_images_raise(model, emoji, tmp_path):
    with pytest.raises(DataError, match=r"search: expected a folder of images, got '.*none', which is not a folder"):
        index_folder(model, emoji, tmp_path / "none")
    with pytest.raises(DataError, match=r"search: expected images \(.bmp, .*\), got none in '.*'\.$"):
        index_folder(model, emoji, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"got none in '.*'; the first of 1 errors: image '.*broken.png': expected"):
        index_folder(model, emoji, tmp_path)


def test_unsupported_models_raise(emoji, model):
    with pytest.raises(ConfigError, match=r"a dual encoder of image and text, .* got Linear on Emoji\. Train one"):
        check_searchable(torch.nn.Linear(2, 2), emoji)
    with pytest.raises(ConfigError, match="got DualEncoder on Digits"):
        check_searchable(model, load_dataset("digits"))


def test_embeddings_are_cached_per_weights(model, emoji, tmp_path):
    weights = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, weights)
    result = []

    def make():
        result.append(1)
        return {"image": torch.full((2, 3), float(len(result)))}

    first, second = (cached_embeddings(tmp_path, weights, emoji, make) for _ in range(2))
    assert len(result) == 1
    assert torch.equal(first["image"], second["image"])
    save_file({"a": torch.zeros(2)}, weights)
    assert float(cached_embeddings(tmp_path, weights, emoji, make)["image"][0, 0]) == 2.0
    (tmp_path / NAME).write_bytes(b"half a file")
    assert float(cached_embeddings(tmp_path, weights, emoji, make)["image"][0, 0]) == 3.0
    assert float(load_file(tmp_path / NAME)["image"][0, 0]) == 3.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", NAME]


def test_unwritable_folder(model, emoji, tmp_path, monkeypatch):
    weights = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, weights)

    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr("os.replace", refuse)
    assert torch.equal(
        cached_embeddings(tmp_path, weights, emoji, lambda: {"image": torch.ones(1)})["image"], torch.ones(1)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_half_block_characters_encode_two_pixels():
    picture = torch.zeros(4, 4, 3, dtype=torch.uint8)
    picture[:2, :, 0], picture[2:, :, 2] = 200, 100
    console = Console(force_terminal=True, color_system="truecolor", width=40)
    with console.capture() as seen:
        console.print(image_to_blocks(picture, columns=4))
    lines = seen.get().splitlines()
    assert len(lines) == 2
    assert lines[0].count(HALF) == 4
    assert "38;2;200;0;0;48;2;200;0;0" in lines[0]
    assert "38;2;0;0;100;48;2;0;0;100" in lines[1]
