"""Where the tokens of a picture lie in it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class PatchGrid(NamedTuple):
    """Rows and columns of the tokens of a picture.

    Attributes:
        rows, columns: of tokens, from the upper left, line by line.
        known: False where the places are not known, and the tokens stand in one line.
        why: how the shape was found.
    """

    rows: int
    columns: int
    known: bool
    why: str


def patch_grid(count: int, inputs: dict[str, Any], config: Any, kind: str = "image") -> PatchGrid:
    """The grid of ``count`` picture tokens.

    What the processor says (``image_grid_thw`` over ``spatial_merge_size``) goes first, then a square. Pieces of a
    picture, or tokens that end its lines, fit neither: they stand in one line, in the order in which the model reads.

    Example:
        >>> patch_grid(9, {}, None)[:3], patch_grid(7, {}, None)[:3]
        ((3, 3, True), (1, 7, False))
        >>> patch_grid(6, {"image_grid_thw": [[1, 4, 6]]}, None)[:3]
        (2, 3, True)
    """
    if kind == "audio":
        return PatchGrid(1, count, True, f"{count} tokens in the order of time")
    found = inputs.get("image_grid_thw")
    if found is not None and len(found) == 1:
        frames, rows, columns = (int(size) for size in found[0])
        merge = _merge(config) or math.isqrt(max(frames * rows * columns // max(count, 1), 1))
        if frames == 1 and (rows // merge) * (columns // merge) == count:
            return PatchGrid(
                rows // merge, columns // merge, True, f"image_grid_thw, {merge} x {merge} patches a token"
            )
    side = math.isqrt(count)
    if count and side * side == count:
        return PatchGrid(
            side, side, True, f"{count} tokens are a square of {side} x {side}" if count > 1 else "one token"
        )
    return PatchGrid(
        1, count, False, f"{count} tokens are no square, and the processor names no grid: one line of tokens"
    )


def frame_index(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of what is left of a picture (width, height) whose middle is cut out.

    Example:
        >>> from types import SimpleNamespace as Part
        >>> cut = Part(do_center_crop=True, size={"shortest_edge": 6}, crop_size={"height": 6, "width": 6})
        >>> frame_index(Part(image_processor=cut), (20, 10))
        (0.25, 0.0, 0.75, 1.0)
    """
    part = getattr(processor, "image_processor", None)
    size_, crop = (getattr(part, name, None) for name in ("size", "crop_size"))
    if not getattr(part, "do_center_crop", False) or not size_ or not crop or not size_.get("shortest_edge"):
        return (0.0, 0.0, 1.0, 1.0)
    scale = size_["shortest_edge"] / min(size)
    edges = []
    for given, kept in zip(size, (crop["width"], crop["height"]), strict=True):
        part_ = min(1.0, kept / (given * scale))
        edges.append(((1 - part_) / 2, (1 + part_) / 2))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _merge(config: Any) -> int | None:
    for part in (config, getattr(config, "vision_config", None)):
        if isinstance(found := getattr(part, "spatial_merge_size", None), int):
            return found
    return None
