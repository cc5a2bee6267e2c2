"""Draws docs/pictures/red_car.png: attention maps of the words of "The red car is parked" in a trained scenes_vlm.

equipoise compare --config scenes_vlm --methods mlp --seeds 1 --out runs python scripts/red_car.py
runs/runs/all/mlp/seed0"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

import equipoise as eq
from equipoise.data.sets.scene_rendering import COLORS, SceneObject, patches_of, render_scene
from equipoise.data.sets.scenes import PATCH, SIZE, Scenes
from equipoise.data.sets.text_codes import IDS, IMAGE, encode_text
from equipoise.models.vision_language import VisionLanguageModel, attention_map, pointing
from equipoise.report.plot_style import GRID, INK, MUTED, STYLE

SENTENCE = "The red car is parked"
OBJECTS = (
    SceneObject("red", "car", 8, 24, 24),
    SceneObject("blue", "truck", 16, 0, 24),
    SceneObject("green", "tree", 32, 24, 16),
)
WORDS = (("red", "color"), ("car", "shape"))
LEAST = 0.05
"""Smallest attention of a patch that is labeled with its value."""
OUT = Path(__file__).parents[1] / "docs" / "pictures" / "red_car.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run of scenes_vlm")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    model, source = eq.load(chosen.run), Scenes()
    if not isinstance(model, VisionLanguageModel):
        raise SystemExit(f"{chosen.run} contains a {type(model).__name__}, not a run of scenes_vlm.")
    picture, owner = render_scene(OBJECTS, SIZE)
    maps = {}
    for word, kind in WORDS:
        layer, head = pointing(model, source, "val", kind).best
        maps[word] = (word_attention(model, source, picture, word)[layer, head], f"layer {layer + 1}, head {head + 1}")
    chosen.out.parent.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        paint(picture, owner, maps, complete(model, source, picture)).savefig(chosen.out, dpi=200, facecolor="white")


def inputs(source: Scenes, picture: np.ndarray, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    return source.standardized(torch.from_numpy(picture))[None], torch.tensor([[IDS[IMAGE], *encode_text(text)]])


@torch.no_grad()
def word_attention(model: VisionLanguageModel, source: Scenes, picture: np.ndarray, word: str) -> np.ndarray:
    """Returns the (layer, head, patch) attention of a word of the sentence."""
    image, text = inputs(source, picture, SENTENCE)
    position = (text[0] == IDS[word]).nonzero()[0]
    return attention_map(model, image, text, position)[0].numpy()


@torch.no_grad()
def complete(model: VisionLanguageModel, source: Scenes, picture: np.ndarray) -> str:
    """Returns the word with which the model completes the sentence."""
    image, text = inputs(source, picture, SENTENCE.rsplit(" ", 1)[0])
    return model.words[int(model.answer({"image": image, "text": text}))]


def shares(attention: np.ndarray, owner: np.ndarray) -> list[tuple[str, float]]:
    """Returns the attention to each object, which has the patches that it mostly covers, and to the background."""
    count = SIZE // PATCH
    blocks = owner.reshape(count, PATCH, count, PATCH).transpose(0, 2, 1, 3).reshape(count * count, -1)
    most = np.array([np.bincount(block[block >= 0], minlength=1).argmax() if (block >= 0).any() else -1
                     for block in blocks])  # fmt: skip
    found = [(f"{thing.color} {thing.shape}", attention[most == n].sum()) for n, thing in enumerate(OBJECTS)]
    return [*found, ("background", attention[most < 0].sum())]


def paint(picture: np.ndarray, owner: np.ndarray, maps: dict, ending: str) -> Figure:
    figure = Figure(figsize=(9.0, 3.95))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 3, height_ratios=(1, 0.045), hspace=0.08, wspace=0.07, left=0.012, right=0.988, top=0.9, bottom=0.135
    )
    shown = picture.transpose(1, 2, 0)
    axes = clear_axes(figure.add_subplot(grid[0, 0]), "Image")
    axes.imshow(shown, interpolation="nearest", extent=(0, SIZE, SIZE, 0))
    below = figure.add_subplot(grid[1, 0])
    below.axis("off")
    below.text(0, -0.4, f"“The red car is …”   model output: {ending}", fontsize=9.5, color=MUTED, va="center")
    top = max(attention.max() for attention, _ in maps.values())
    for column, (word, (attention, where)) in enumerate(maps.items(), start=1):
        axes = clear_axes(figure.add_subplot(grid[0, column]), f"Attention of “{word}”")
        axes.imshow(overlay(shown, attention / top), interpolation="nearest", extent=(0, SIZE, SIZE, 0))
        outline(axes, patches_of(owner, [0], PATCH))
        for patch, share in enumerate(attention):
            if share >= LEAST:
                y, x = np.array(divmod(patch, SIZE // PATCH)) * PATCH + PATCH / 2
                text = axes.text(x, y, f"{100 * share:.0f} %", ha="center", va="center", fontsize=8, color="white")
                text.set_path_effects([patheffects.withStroke(linewidth=1.6, foreground=INK)])
        stacked_bar(figure.add_subplot(grid[1, column]), shares(attention, owner), where)
    return figure


def clear_axes(axes: Axes, title: str) -> Axes:
    axes.set_title(title, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for edge in axes.spines.values():
        edge.set_visible(True)
        edge.set_color(GRID)
    return axes


def overlay(shown: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Blends the image with white: pale without attention, full color at the strongest attention."""
    side = SIZE // PATCH
    weight = np.kron(np.sqrt(strength).reshape(side, side), np.ones((PATCH, PATCH)))[..., None]
    pale = 255 - 0.22 * (255 - shown.astype(float))
    return (weight * shown + (1 - weight) * pale).astype(np.uint8)


def outline(axes: Axes, true: np.ndarray) -> None:
    """Draws a dashed line around the true patches."""
    side = SIZE // PATCH
    padded = np.pad(true.reshape(side, side), 1)
    lines = []
    for y, x in np.argwhere(padded):
        for dy, dx, ends in ((-1, 0, ((0, 0), (1, 0))), (1, 0, ((0, 1), (1, 1))), (0, -1, ((0, 0), (0, 1))),
                             (0, 1, ((1, 0), (1, 1)))):  # fmt: skip
            if not padded[y + dy, x + dx]:
                lines.append([(PATCH * (x - 1 + a), PATCH * (y - 1 + b)) for a, b in ends])
    axes.add_collection(LineCollection(lines, colors=INK, linewidths=1.3, linestyles=[(0, (3, 2))], clip_on=False))


def stacked_bar(axes: Axes, parts: list[tuple[str, float]], where: str) -> None:
    """Draws a stacked bar of the attention to each object, with labels."""
    axes.axis("off")
    start, words = 0.0, []
    for name, share in parts:
        shade = (
            "#cfd3d8" if name == "background" else matplotlib.colors.to_hex([c / 255 for c in COLORS[name.split()[0]]])
        )
        axes.barh(0, share, left=start, color=shade, height=1)
        start += share
        words += [f"{name.split()[-1]} {100 * share:.0f} %"] if share >= 0.005 else []
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    axes.text(0, -1.35, " · ".join(words), fontsize=8.6, color=INK, va="center")
    axes.text(0, -2.75, where, fontsize=8.2, color=MUTED, va="center")


if __name__ == "__main__":
    main()
