"""Positions of image tokens in the image."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .tile_layout import count_tiles

NOT_SPATIAL = re.compile("perceiver|qformer|resampler|num_query_tokens|latent_query")
"""Options of the configuration of models whose image tokens are learned queries over the whole image."""


class PatchGrid(NamedTuple):
    """Grid of the tokens of an image.

    Attributes:
        rows, columns: size of the grid; tokens are ordered row by row from the upper left.
        known: False if the positions are unknown; the grid is then a single row.
        why: how the shape was determined.
    """

    rows: int
    columns: int
    known: bool
    why: str


def patch_grid(count: int, inputs: dict[str, Any], config: Any, kind: str = "image") -> PatchGrid:
    """Returns the grid of ``count`` image tokens.

    The grid of the processor (``image_grid_thw`` divided by ``spatial_merge_size``) takes precedence, then a square.
    Learned queries, images split into tiles, and other numbers of tokens have a single row in sequence order;
    ``token_regions`` finds the places of the tokens of tiles.

    Example:
        >>> patch_grid(9, {}, None)[:3], patch_grid(7, {}, None)[:3]
        ((3, 3, True), (1, 7, False))
        >>> patch_grid(6, {"image_grid_thw": [[1, 4, 6]]}, None)[:3]
        (2, 3, True)
    """
    if kind == "audio":
        return PatchGrid(1, count, True, f"{count} tokens in temporal order")
    if option := learned_queries(config):
        why = f"each of the {count} tokens is a learned query over the whole image ({option})"
        return PatchGrid(1, count, False, why)
    if (tiles := count_tiles(inputs)) > 1:
        return PatchGrid(1, count, False, f"{tiles} tiles in an unknown layout")
    sizes = inputs.get("image_grid_thw")
    if sizes is not None and len(sizes) == 1:
        frames, rows, columns = (int(size) for size in sizes[0])
        merge = _spatial_merge_size(config) or math.isqrt(max(frames * rows * columns // max(count, 1), 1))
        if frames == 1 and (rows // merge) * (columns // merge) == count:
            return PatchGrid(
                rows // merge, columns // merge, True, f"image_grid_thw, {merge} x {merge} patches per token"
            )
    side = math.isqrt(count)
    if count and side * side == count:
        return PatchGrid(
            side, side, True, f"{count} tokens form a square of {side} x {side}" if count > 1 else "one token"
        )
    return PatchGrid(1, count, False, f"{count} is not a square number, and the processor provides no grid")


def learned_queries(config: Any) -> str | None:
    """Returns the option of the configuration by which image tokens are learned queries without positions, or None.

    Example:
        >>> from types import SimpleNamespace
        >>> learned_queries(SimpleNamespace(qformer_config={})), learned_queries(SimpleNamespace(use_resampler=False))
        ('qformer_config', None)
    """
    for name, value in getattr(config, "__dict__", {}).items():
        if NOT_SPATIAL.search(name) and value not in (None, False):
            return name
    return None


def image_parts(places: Sequence[int], images: int, inputs: dict[str, Any], config: Any) -> list[list[int]] | None:
    """Splits the positions of image tokens into those of each image; None if the sizes are unknown.

    The sizes are those of ``image_grid_thw``, or of runs of adjacent tokens if there is one for each image, or equal.

    Example:
        >>> image_parts([1, 2, 5, 6], 2, {}, None), image_parts([1, 2, 3, 4], 2, {}, None)
        ([[1, 2], [5, 6]], [[1, 2], [3, 4]])
        >>> image_parts([1, 2, 3], 2, {}, None)
    """
    grids = inputs.get("image_grid_thw")
    if grids is not None and len(grids) == images:
        patches = [math.prod(int(size) for size in grid) for grid in grids]
        merged = math.isqrt(max(sum(patches) // max(len(places), 1), 1)) ** 2
        counts = [count // merged for count in patches]
        if sum(counts) == len(places):
            return _split(places, counts)
    runs: list[list[int]] = []
    for place in places:
        if not runs or runs[-1][-1] != place - 1:
            runs.append([])
        runs[-1].append(place)
    if len(runs) == images:
        return runs
    return _split(places, [len(places) // images] * images) if len(places) % images == 0 else None


def _split(places: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [list(places[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def frame_index(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Returns the left, upper, right and lower edge of the center crop of an image (width, height), from 0 to 1.

    Without a center crop in the processor, this is the whole image.

    Example:
        >>> from types import SimpleNamespace as Part
        >>> cut = Part(do_center_crop=True, size={"shortest_edge": 6}, crop_size={"height": 6, "width": 6})
        >>> frame_index(Part(image_processor=cut), (20, 10))
        (0.25, 0.0, 0.75, 1.0)
    """
    image_processor = getattr(processor, "image_processor", None)
    resize, crop = (getattr(image_processor, name, None) for name in ("size", "crop_size"))
    if (
        not getattr(image_processor, "do_center_crop", False)
        or not resize
        or not crop
        or not resize.get("shortest_edge")
    ):
        return (0.0, 0.0, 1.0, 1.0)
    scale = resize["shortest_edge"] / min(size)
    edges = []
    for side, cropped in zip(size, (crop["width"], crop["height"]), strict=True):
        fraction = min(1.0, cropped / (side * scale))
        edges.append(((1 - fraction) / 2, (1 + fraction) / 2))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _spatial_merge_size(config: Any) -> int | None:
    for part in (config, getattr(config, "vision_config", None)):
        if isinstance(size := getattr(part, "spatial_merge_size", None), int):
            return size
    return None
