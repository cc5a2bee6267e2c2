"""Regions of an image that its tokens cover, from the regions of its tiles and the number of tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .patch_layout import learned_queries
from .tile_layout import TOLERANCE, Box, Tile


class TokenRegions(NamedTuple):
    """Tokens with the regions that they cover.

    Attributes:
        title: "tiles" or "overview".
        rows, columns: number of tokens in each direction.
        tokens: indices among the tokens of all images.
        boxes: the region of each token, clipped to the image.
        why: how the regions were determined.
    """

    title: str
    rows: int
    columns: int
    tokens: tuple[int, ...]
    boxes: tuple[Box, ...]
    why: str


def token_regions(
    tiles: Sequence[Tile], images: int, count: int, inputs: Mapping[str, Any], config: Any
) -> list[list[TokenRegions]] | None:
    """Returns the maps of each image; None unless the number of tokens confirms the layout.

    Two layouts are known. In the first, each tile has the same number of tokens, row by row: its patches, or squares
    of m x m patches. In the second (LLaVA-NeXT), the tokens of the whole image are followed by those of all tiles as
    one grid, without rows or columns of padding, with one token at the end of each row.

    Args:
        tiles: of all images in the order of ``pixel_values``.
        images: number of images.
        count: number of image tokens of the prompt.
        inputs: inputs of the model.
        config: configuration of the model.
    """
    patch = _patch_size(config)
    if patch is None or learned_queries(config) or len({tile.size for tile in tiles}) != 1:
        return None
    groups = [[tile for tile in tiles if tile.image == index] for index in range(images)]
    if not all(groups) or [tile.image for tile in tiles] != sorted(tile.image for tile in tiles):
        return None
    (height, width), sizes = tiles[0].size, inputs.get("image_sizes")
    patches = (height // patch[0], width // patch[1])
    if sizes is not None and hasattr(config, "image_grid_pinpoints"):
        parts = [
            _row_end_maps(group, patches, [int(side) for side in size])
            for group, size in zip(groups, sizes, strict=False)
        ]  # fmt: skip
        fitting = [part for part in parts if part is not None]
        # With a limit on the number of tokens (LLaVA-OneVision), large grids are interpolated.
        if len(parts) != images or len(fitting) != images:
            return None
        limit = re.fullmatch(r"anyres_max_(\d+)", str(getattr(config, "vision_aspect_ratio", "")))
        return _confirmed([part(int(limit[1]) if limit else None) for part in fitting], count)
    merge = math.isqrt(max(len(tiles) * patches[0] * patches[1] // max(count, 1), 1))
    rows, columns = patches[0] // merge, patches[1] // merge
    if len(tiles) * rows * columns != count or (rows * merge, columns * merge) != patches:
        return None
    why = f"{rows} x {columns} tokens for each tile"
    return _confirmed([_tile_maps(group, rows, columns, why) for group in groups], count)


def grid_boxes(rows: int, columns: int, box: Box) -> list[Box]:
    """Returns the boxes of a grid in a region, row by row.

    Example:
        >>> grid_boxes(1, 2, (0.0, 0.0, 1.0, 1.0))
        [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    """
    left, upper, right, lower = box
    xs, ys = np.linspace(left, right, columns + 1).tolist(), np.linspace(upper, lower, rows + 1).tolist()
    return [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]


class _Part(NamedTuple):
    """Maps of one image before its tokens are numbered among those of all images, and its number of tokens."""

    maps: list[TokenRegions]
    count: int


def _patch_size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", None), "patch_size", None)
    size = (size, size) if isinstance(size, int) else size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _clipped(boxes: Sequence[Box], start: int, title: str, rows: int, columns: int, why: str) -> TokenRegions:
    """A map of tokens from ``start``, without those that cover padding only."""
    clipped = [tuple(round(min(max(edge, 0.0), 1.0), 5) for edge in box) for box in boxes]
    kept = [n for n, (left, upper, right, lower) in enumerate(clipped) if right > left and lower > upper]
    regions = tuple(clipped[n] for n in kept)
    return TokenRegions(title, rows, columns, tuple(start + n for n in kept), regions, why)  # pyright: ignore[reportArgumentType]


def _is_overview(box: Box) -> bool:
    return box[0] <= TOLERANCE and box[1] <= TOLERANCE and min(box[2:]) >= 1 - TOLERANCE


def _tile_maps(tiles: Sequence[Tile], rows: int, columns: int, why: str) -> _Part | None:
    each = rows * columns
    whole = [n for n, tile in enumerate(tiles) if _is_overview(tile.box)]
    parts = [n for n in range(len(tiles)) if n not in whole]
    if len(whole) > 1 or _overlap([tiles[n].box for n in parts]):
        return None
    maps = []
    if parts:
        boxes = [(n, grid_boxes(rows, columns, tiles[n].box)) for n in parts]
        tokens = [_clipped(part, n * each, "tiles", rows, columns, why) for n, part in boxes]
        across = [len({round(tiles[n].box[axis] / TOLERANCE / 2) for n in parts}) for axis in (1, 0)]
        maps.append(
            TokenRegions(
                "tiles", rows * across[0], columns * across[1], tuple(n for part in tokens for n in part.tokens),
                tuple(box for part in tokens for box in part.boxes), f"{len(parts)} tiles, {why}",
            )
        )  # fmt: skip
    maps += [_clipped(grid_boxes(rows, columns, tiles[n].box), n * each, "overview", rows, columns, why) for n in whole]
    return _Part(maps, len(tiles) * each)


def _overlap(boxes: Sequence[Box]) -> bool:
    return any(
        min(a[2], b[2]) - max(a[0], b[0]) > TOLERANCE and min(a[3], b[3]) - max(a[1], b[1]) > TOLERANCE
        for n, a in enumerate(boxes) for b in boxes[:n]
    )  # fmt: skip


def _row_end_maps(
    tiles: Sequence[Tile], patches: tuple[int, int], size: Sequence[int]
) -> Callable[[int | None], _Part] | None:
    """The maps of LLaVA-NeXT as a function of the largest number of tiles whose tokens are kept."""
    whole = _clipped(grid_boxes(*patches, tiles[0].box), 0, "overview", *patches, "tokens of the whole image")
    base = patches[0] * patches[1]
    if not _is_overview(tiles[0].box):
        return None
    if len(tiles) == 1:
        return lambda limit: _Part([whole], base + 1)
    boxes = np.array([tile.box for tile in tiles[1:]])
    canvas: Box = (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
    extent = np.subtract(canvas[2:], canvas[:2])
    columns, rows = (int(side) for side in (extent / (boxes[0, 2:] - boxes[0, :2])).round())
    if rows * columns != len(boxes) or np.abs(boxes - grid_boxes(rows, columns, canvas)).max() > TOLERANCE:
        return None

    def maps(limit: int | None) -> _Part:
        grid = [rows * patches[0], columns * patches[1]]
        # The axis with padding is the one that the image fills less; equal numbers of patches are cut at both ends.
        axis = int(size[1] / size[0] <= grid[1] / grid[0])
        filled = int(round(size[axis] * grid[1 - axis] / size[1 - axis], 7))
        cut = (grid[axis] - filled) // 2
        edges = np.array([[canvas[1], canvas[3]], [canvas[0], canvas[2]]])
        edges[axis] += np.array([cut, -cut]) * (edges[axis, 1] - edges[axis, 0]) / grid[axis]
        grid[axis] -= 2 * cut
        why = f"{rows} x {columns} tiles as one grid, with one token after each row"
        ratio = math.sqrt(grid[0] * grid[1] / (limit * base)) if limit else 1.0
        if ratio > 1.1:
            grid = [int(side // ratio) for side in grid]
            why += f", interpolated to {grid[0]} x {grid[1]}"
        (upper, lower), (left, right) = edges.tolist()
        regions = grid_boxes(grid[0], grid[1], (left, upper, right, lower))
        ended = [box for n, box in enumerate(regions) for box in
                 ([box, (0.0, 0.0, 0.0, 0.0)] if n % grid[1] == grid[1] - 1 else [box])]  # fmt: skip
        tiled = _clipped(ended, base, "tiles", grid[0], grid[1], why)
        return _Part([tiled, whole], base + len(ended))

    return maps


def _confirmed(parts: Sequence[_Part | None], count: int) -> list[list[TokenRegions]] | None:
    """The maps with tokens numbered among those of all images, if their number is that of the prompt."""
    known = [part for part in parts if part is not None]
    if len(known) != len(parts) or sum(part.count for part in known) != count:
        return None
    starts = np.cumsum([0, *(part.count for part in known)]).tolist()
    return [
        [one._replace(tokens=tuple(start + token for token in one.tokens)) for one in part.maps]
        for part, start in zip(known, starts, strict=False)
    ]
