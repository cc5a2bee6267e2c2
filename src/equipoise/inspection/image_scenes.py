"""Maps of images: the regions of all image tokens, or a single row of tokens if their positions are unknown."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from .inspection_result import ImageScene
from .patch_layout import PatchGrid, frame_index, image_parts, patch_grid
from .tile_layout import TOLERANCE, Box, Tile, count_tiles, locate_tiles
from .token_layout import grid_boxes, token_regions

IMAGE_SIZE = 512
"""Pixels of the longer side of the image in the report."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Where the tokens of the images are; attributes as in ``Inspection``."""

    grid: PatchGrid | None
    frame: Box = WHOLE
    scenes: Sequence[ImageScene] = field(default=())
    unplaced: Sequence[int] = field(default=())
    separators: Sequence[int] = field(default=())


def image_layout(
    processor: Any, process: Callable[[Mapping[str, Any]], Mapping[str, Any]], pictures: Sequence[Image.Image],
    places: Sequence[int], inputs: Mapping[str, Any], config: Any,
) -> ImageLayout:  # fmt: skip
    """Returns the layout of the image tokens at ``places``; those of tiles by ``token_regions``."""
    count, number = len(places), len(pictures)
    tiles = locate_tiles(process, pictures)
    if max(count_tiles(inputs), len(tiles or ())) > number:
        maps = token_regions(tiles, number, count, inputs, config) if tiles else None
        if maps is None:
            return ImageLayout(patch_grid(count, dict(inputs), config))
        scenes, separators = [], []
        for index, (picture, found) in enumerate(zip(pictures, maps, strict=True)):
            # Unpadding may leave no row of a very wide image.
            parts = [part for part in found if part.tokens]
            prefix = f"image {index + 1}, " if number > 1 else ""
            for part in parts:
                grid = PatchGrid(part.rows, part.columns, True, part.why)
                own = tuple(places[token] for token in part.tokens)
                scenes.append(ImageScene(encode_png(picture), grid, WHOLE, own, prefix + part.title, part.boxes))
            drawn = [place for scene in scenes[-len(parts) :] for place in scene.places]
            separators += sorted(set(range(min(drawn), max(drawn))) - set(places))
        drawn = {place for scene in scenes for place in scene.places}
        unplaced = [place for place in places if place not in drawn]
        return ImageLayout(scenes[0].grid, WHOLE, scenes, unplaced, separators)
    frames = [_frame(processor, tiles, index, picture) for index, picture in enumerate(pictures)]
    if number == 1:
        return ImageLayout(_single_grid(count, inputs, config, tiles), frames[0])
    parts = image_parts(places, number, dict(inputs), config)
    if parts is None:
        return ImageLayout(PatchGrid(1, count, False, "the tokens of each image are unknown"))
    grids = inputs.get("image_grid_thw")
    scenes = []
    for index, (picture, part) in enumerate(zip(pictures, parts, strict=True)):
        own = {} if grids is None else {"image_grid_thw": grids[index : index + 1]}
        grid = _single_grid(len(part), own, config, tiles and [tile for tile in tiles if tile.image == index])
        scenes.append(ImageScene(encode_png(picture), grid, frames[index], tuple(part), f"image {index + 1}"))
    return ImageLayout(scenes[0].grid, scenes[0].frame, scenes)


def mean_token_layout(processor: Any, picture: Image.Image, places: Sequence[int], config: Any) -> ImageLayout | None:
    """Returns the layout of Florence-2: a token for the mean of the image, then a square of tokens, row by row.

    None for other models, which have no ``max_temporal_embeddings``, and if the number of tokens is not 1 + n^2.
    """
    side = math.isqrt(max(len(places) - 1, 0))
    if not hasattr(getattr(config, "vision_config", None), "max_temporal_embeddings") or side**2 + 1 != len(places):
        return None
    grid = PatchGrid(side, side, True, f"one token for the mean of the image, then {side} x {side} tokens")
    boxes = tuple(grid_boxes(side, side, frame_index(processor, picture.size)))
    scene = ImageScene(encode_png(picture), grid, WHOLE, tuple(places[1:]), "image", boxes)
    return ImageLayout(grid, WHOLE, [scene], places[:1])


def encode_png(picture: Image.Image) -> bytes:
    """Encodes an image, reduced to ``IMAGE_SIZE``."""
    small = picture.copy()
    small.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _single_grid(count: int, inputs: Mapping[str, Any], config: Any, tiles: Sequence[Tile] | None) -> PatchGrid:
    """The grid of an image that is not split into tiles."""
    grid = patch_grid(count, dict(inputs), config)
    if grid.known or not tiles:
        return grid
    maps = token_regions([tile._replace(image=0) for tile in tiles], 1, count, inputs, config)
    if not maps or len(maps[0]) != 1 or len(maps[0][0].tokens) != count:
        return grid
    return PatchGrid(maps[0][0].rows, maps[0][0].columns, True, f"{maps[0][0].rows} x {maps[0][0].columns} tokens")


def _frame(processor: Any, tiles: Sequence[Tile] | None, index: int, picture: Image.Image) -> Box:
    """The region of an image that its grid covers: the crop of the processor's options, or as it was measured."""
    expected = frame_index(processor, picture.size)
    own = [tile.box for tile in tiles or () if tile.image == index]
    return own[0] if len(own) == 1 and np.abs(np.subtract(own[0], expected)).max() > 2 * TOLERANCE else expected
