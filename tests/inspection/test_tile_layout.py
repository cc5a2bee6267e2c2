"""Regions of image tokens: a change of a region of the image changes the embeddings of exactly its tokens."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.inspection import look
from equipoise.inspection.image_scenes import image_layout
from equipoise.inspection.prompt_inputs import prompt_encoder
from equipoise.inspection.tile_layout import TOLERANCE, Tile, locate_tiles
from equipoise.inspection.token_layout import token_regions
from equipoise.report.look_html import look_page
from helpers import encoder_decoders
from helpers.look import QUESTION, build_llava, build_processor, wide_image
from helpers.tiled_images import FAMILIES, build, image_embeddings, noise_image

SIZES = [
    (120, 60),
    (70, 190),
    (100, 100),
    *(pytest.param(size, marks=pytest.mark.slow) for size in [(64, 50), (200, 41)]),
]


def prepared(name, images):
    """Returns a model, the function that processes images, the inputs, and the mask of image tokens."""
    model, processor = build(name)
    _, process = prompt_encoder(model, processor, QUESTION, {"images": images})
    inputs = process({"images": images})
    return model, process, inputs, inputs["input_ids"][0] == model.config.image_token_id


def layout_of(model, process, inputs, labels, images):
    places = labels.nonzero().flatten().tolist()
    return image_layout(None, process, images, places, inputs, model.config)


def changed_tokens(model, process, images, labels, index, box):
    """Returns the positions of the image tokens whose embeddings depend on a region (left, upper, right, lower)."""
    pixels = np.array(images[index])
    region = (slice(box[1], box[3]), slice(box[0], box[2]))
    pixels[region] = 255 - pixels[region]
    changed = [*images[:index], Image.fromarray(pixels), *images[index + 1 :]]
    before, after = (image_embeddings(model, process({"images": given}), labels) for given in (images, changed))
    places = labels.nonzero().flatten()
    return set(places[(after - before).abs().amax(dim=1) > 1e-6].tolist())


def overlapping(scene, size, box, margin):
    """Returns the tokens of a scene whose regions overlap a region, extended by a margin in pixels of the image."""
    scale = np.array([*size, *size])
    return {
        place
        for place, edges in zip(scene.places, np.array(scene.boxes) * scale, strict=True)
        if min(edges[2], box[2] + margin[0]) > max(edges[0], box[0] - margin[0])
        and min(edges[3], box[3] + margin[1]) > max(edges[1], box[1] - margin[1])
    }


def assert_tokens_match(scene, size, box, changed):
    """Each token whose region overlaps the changed one must change; only those nearby may, by interpolation."""
    rows, columns = scene.grid[:2]
    # Filters of antialiased resizing extend over three pixels of the smaller image; Idefics 3 resizes twice.
    reach = [max(9.0, 1.6 * side / number) for side, number in zip(size, (columns, rows), strict=True)]
    own = changed & set(scene.places)
    assert overlapping(scene, size, box, (-1.5, -1.5)) <= own <= overlapping(scene, size, box, reach)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_regions_are_those_that_change_the_embeddings(name, size):
    images = [noise_image(*size)]
    model, process, inputs, labels = prepared(name, images)
    layout = layout_of(model, process, inputs, labels, images)
    assert layout.grid.known
    if not layout.scenes:
        # Gemma 3 does not split square images.
        assert name == "gemma3"
        assert layout.grid[:2] == (4, 4)
        return
    assert {scene.title for scene in layout.scenes} == {"tiles", "overview"}
    drawn = {place for scene in layout.scenes for place in scene.places}
    assert drawn | set(layout.unplaced) == set(labels.nonzero().flatten().tolist())
    width, height = size
    for left, upper in [(0, 0), (width // 2 - 5, height // 3), (width - width // 5, height - height // 4)]:
        box = (left, upper, left + width // 6, upper + height // 5)
        changed = changed_tokens(model, process, images, labels, 0, box)
        assert not changed & set(layout.unplaced)
        for scene in layout.scenes:
            assert_tokens_match(scene, size, box, changed)


@pytest.mark.parametrize("name", ["internvl", "idefics3", "llava_next"])
def test_several_images(name):
    images = [noise_image(120, 60), noise_image(70, 190, seed=1)]
    model, process, inputs, labels = prepared(name, images)
    layout = layout_of(model, process, inputs, labels, images)
    assert [scene.title for scene in layout.scenes] == [
        f"image {number}, {part}" for number in (1, 2) for part in ("tiles", "overview")
    ]
    for index, image in enumerate(images):
        box = (10, 20, 40, 50)
        changed = changed_tokens(model, process, images, labels, index, box)
        for scene in layout.scenes[2 * index : 2 * index + 2]:
            assert_tokens_match(scene, image.size, box, changed)
        others = [scene for n, scene in enumerate(layout.scenes) if n // 2 != index]
        assert not changed & {place for scene in others for place in scene.places}


def test_tokens_at_the_ends_of_rows_and_separators_are_not_drawn():
    images = [noise_image(120, 60)]
    model, process, inputs, labels = prepared("llava_next", images)
    layout = layout_of(model, process, inputs, labels, images)
    # One token after each of 8 rows of 16 tokens, which follow the 8 x 8 tokens of the whole image.
    first = labels.nonzero().flatten().tolist()[64]
    assert list(layout.unplaced) == [first + 17 * row + 16 for row in range(8)]
    assert layout.separators == []
    model, process, inputs, labels = prepared("idefics3", images)
    layout = layout_of(model, process, inputs, labels, images)
    # Between 9 tiles: the end of the previous one and the name of the next, and the global tag.
    assert len(layout.separators) == 2 * 8
    assert not set(layout.separators) & set(labels.nonzero().flatten().tolist())


def test_tiles_without_tokens_have_no_map():
    images = [noise_image(1000, 30)]
    layout = layout_of(*prepared("llava_next", images), images)
    # Less than one of eight rows of tokens belongs to the image.
    assert [scene.title for scene in layout.scenes] == ["overview"]
    assert len(layout.scenes[0].places) == 64


def test_layout_that_the_number_of_tokens_does_not_confirm_is_a_row(monkeypatch):
    images = [noise_image(120, 60)]
    model, process, inputs, labels = prepared("idefics3", images)
    places = labels.nonzero().flatten().tolist()
    for wrong in (places[:-1], places[:100]):
        # 100 tokens would form a square of 10 x 10.
        layout = image_layout(None, process, images, wrong, inputs, model.config)
        assert layout.grid[:3] == (1, len(wrong), False)
        assert "9 tiles in an unknown layout" in layout.grid.why

    # Tiles that the processor does not place on a linear scale.
    def mirrored(media):
        return {"pixel_values": process(media)["pixel_values"].flip(-1)}

    assert locate_tiles(mirrored, images) is None
    assert not image_layout(None, mirrored, images, places, inputs, model.config).grid.known
    # Learned queries have no positions, whatever their number is.
    monkeypatch.setattr(model.config, "perceiver_config", {}, raising=False)
    assert not image_layout(None, process, images, places, inputs, model.config).grid.known


def test_overlapping_and_unordered_tiles_have_no_regions():
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=4))
    left, right = Tile(0, (0, 0, 0.5, 1), (8, 8)), Tile(0, (0.5, 0, 1, 1), (8, 8))
    assert token_regions([left, right], 1, 8, {}, config) is not None
    assert token_regions([left, left], 1, 8, {}, config) is None
    assert token_regions([left, right._replace(size=(8, 12))], 1, 8, {}, config) is None
    assert token_regions([left._replace(image=1), right], 2, 8, {}, config) is None
    assert token_regions([left, right], 1, 8, {}, SimpleNamespace()) is None
    # Two tiles that both cover the whole image, as those of two encoders, are not one grid.
    whole = Tile(0, (0, 0, 1, 1), (8, 8))
    assert token_regions([whole, whole], 1, 8, {}, config) is None


@pytest.mark.parametrize("size", [(40, 26), (26, 40)])
def test_tiles_of_padding_and_crops(size):
    """The region of a tile is larger than the image with padding, and smaller with a crop."""

    def padded(media):
        side = max(size)
        squares = [Image.new("RGB", (side, side), (9, 9, 9)) for _ in media["images"]]
        for square, image in zip(squares, media["images"], strict=True):
            square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
        values = [np.asarray(square.resize((64, 64)), dtype=np.float32) / 128 - 1 for square in squares]
        return {"pixel_values": torch.from_numpy(np.stack(values)).permute(0, 3, 1, 2)}

    (tile,) = locate_tiles(padded, [noise_image(*size)])
    extra = (40 - 26) / 2 / 26
    long = (0.0, 1.0)
    short = (-extra, 1 + extra)
    x, y = (long, short) if size[0] == 40 else (short, long)
    assert tile.box == pytest.approx((x[0], y[0], x[1], y[1]), abs=TOLERANCE)
    processor = build_processor(size=48)
    (tile,) = locate_tiles(lambda media: processor(text="<image>", return_tensors="pt", **media), [noise_image(*size)])
    edges = (7 / 40, 33 / 40)
    x, y = (edges, long) if size[0] == 40 else (long, edges)
    assert tile.box == pytest.approx((x[0], y[0], x[1], y[1]), abs=TOLERANCE)


def test_look_at_tiles():
    model, processor = build("llava_next")
    result = look(model, processor, image=noise_image(120, 60), text=QUESTION, max_new_tokens=2)
    assert [scene.title for scene in result.scenes] == ["tiles", "overview"]
    assert result.grid[:3] == (8, 16, True)
    content = result.to_dict()
    assert len(content["unplaced"]) == 8
    assert all(len(scene["boxes"]) == len(scene["places"]) for scene in content["scenes"])
    page = re.sub(r"\s+", " ", look_page(content))
    assert "on the same scale (tiles: 8 x 16 tokens; overview: 8 x 8 tokens)" in page
    assert "8 tokens cover no single region of the image" in page
    assert page.count("<canvas") == 2


def test_measured_frame_replaces_that_of_unknown_options():
    """A processor that pads, of which no option tells it."""
    processor = build_processor(size=48, patch=16)

    class Padding:
        chat_template, image_token, tokenizer = None, "<image>", processor.tokenizer

        def __call__(self, images, **options):
            squares = [Image.new("RGB", (max(image.size),) * 2) for image in images]
            for square, image in zip(squares, images, strict=True):
                square.paste(image, (0, 0))
            return processor(images=squares, **options)

    result = look(build_llava(size=48, patch=16), Padding(), image=wide_image(), text=QUESTION, max_new_tokens=1)
    assert result.grid[:3] == (3, 3, True)
    assert result.frame == pytest.approx((0, 0, 1, 26 / 18), abs=TOLERANCE)


def test_florence():
    model, processor, inputs = encoder_decoders.build("florence2")
    result = look(model, processor, **inputs, max_new_tokens=2)
    (scene,) = result.scenes
    assert (scene.grid[:3], len(scene.boxes), result.unplaced) == ((2, 2, True), 4, (0,))
    assert "1 token covers no single region" in look_page(result.to_dict())
    # The order of the tokens: each corner changes its own token the most, and the mean.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if re.search(r"blocks\..*(proj|fc2|conv\d)\.(weight|bias)$", name):
                weight.zero_()
    base = np.full((80, 80, 3), 128, dtype=np.uint8)
    features = []
    for corner in (None, *((row, column) for row in (0, 70) for column in (0, 70))):
        pixels = base.copy()
        if corner:
            pixels[corner[0] : corner[0] + 10, corner[1] : corner[1] + 10] = 250
        given = processor(images=Image.fromarray(pixels), text=QUESTION, return_tensors="pt")
        with torch.no_grad():
            output = model.model.get_image_features(given["pixel_values"])
        features.append(getattr(output, "pooler_output", output).reshape(5, -1))
    changes = torch.stack([(one - features[0]).norm(dim=1) for one in features[1:]])
    assert changes[:, 1:].argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert (changes[:, 0] > 1e-6).all()
