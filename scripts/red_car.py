"""Draws docs/pictures/red_car.png: where the words of "The red car is parked" look, in a trained scenes_vlm.

equipoise compare --config scenes_vlm --methods mlp --seeds 1 --out runs
python scripts/red_car.py runs/runs/all/mlp/seed0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

import equipoise as eq
from equipoise.data.drawing import COLOURS, Thing, drawn, patches_of
from equipoise.data.scenes import PATCH, SIZE, Scenes
from equipoise.data.vocabulary import IDS, IMAGE, encoded
from equipoise.language import PictureLanguageModel, attention_map, pointing
from equipoise.report.canvas import INK, MUTED, STYLE

matplotlib.use("Agg")
from matplotlib import pyplot

SENTENCE = "The red car is parked"
THINGS = (Thing("red", "car", 0, 24, 24), Thing("blue", "truck", 24, 0, 24), Thing("green", "tree", 32, 24, 16))
WORDS = (("red", "colour"), ("car", "shape"))
OUT = Path(__file__).parents[1] / "docs" / "pictures" / "red_car.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run of scenes_vlm")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    model, source = eq.load(chosen.run), Scenes()
    if not isinstance(model, PictureLanguageModel):
        raise SystemExit(f"{chosen.run} holds a {type(model).__name__}, no run of scenes_vlm.")
    picture, owner = drawn(THINGS, SIZE)
    maps = {}
    for word, kind in WORDS:
        layer, head = pointing(model, source, "val", kind).best
        maps[word] = (look(model, source, picture, word)[layer, head], f"layer {layer + 1}, head {head + 1}")
    chosen.out.parent.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        paint(picture, owner, maps, said(model, source, picture)).savefig(chosen.out, dpi=200, facecolor="white")


def inputs(source: Scenes, picture: np.ndarray, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    return source.standardised(torch.from_numpy(picture))[None], torch.tensor([[IDS[IMAGE], *encoded(text)]])


@torch.no_grad()
def look(model: PictureLanguageModel, source: Scenes, picture: np.ndarray, word: str) -> np.ndarray:
    """(layer, head, patch) attention of a word of the sentence."""
    image, text = inputs(source, picture, SENTENCE)
    place = (text[0] == IDS[word]).nonzero()[0]
    return attention_map(model, image, text, place)[0].numpy()


@torch.no_grad()
def said(model: PictureLanguageModel, source: Scenes, picture: np.ndarray) -> str:
    """How the model ends the sentence."""
    image, text = inputs(source, picture, SENTENCE.rsplit(" ", 1)[0])
    return model.words[int(model.answer({"image": image, "text": text}))]


def shares(attention: np.ndarray, owner: np.ndarray) -> list[tuple[str, float]]:
    """What falls on each thing and on the ground; a patch that two share counts for the one with more of it."""
    count = SIZE // PATCH
    blocks = owner.reshape(count, PATCH, count, PATCH).transpose(0, 2, 1, 3).reshape(count * count, -1)
    most = np.array([np.bincount(block[block >= 0], minlength=1).argmax() if (block >= 0).any() else -1
                     for block in blocks])  # fmt: skip
    found = [(f"{thing.colour} {thing.shape}", attention[most == n].sum()) for n, thing in enumerate(THINGS)]
    return [*found, ("ground", attention[most < 0].sum())]


def paint(picture: np.ndarray, owner: np.ndarray, maps: dict, ending: str) -> pyplot.Figure:
    figure, axes = pyplot.subplots(1, 3, figsize=(9.2, 4.0), layout="constrained")
    shown = picture.transpose(1, 2, 0)
    axes[0].imshow(shown, interpolation="nearest", extent=(0, SIZE, SIZE, 0))
    axes[0].set_title("The scene", fontsize=11)
    axes[0].set_xlabel(f"“The red car is …”: {ending}", color=MUTED, fontsize=9.5, labelpad=8)
    pale = (0.35 * shown + 0.65 * 255).astype(np.uint8)
    for place, (word, (attention, where)) in enumerate(maps.items(), start=1):
        grid = attention.reshape(SIZE // PATCH, -1)
        axes[place].imshow(pale, interpolation="nearest", extent=(0, SIZE, SIZE, 0))
        heat = axes[place].imshow(
            grid, cmap=heat_map(), vmin=0, vmax=max(m.max() for m, _ in maps.values()), extent=(0, SIZE, SIZE, 0),
            interpolation="nearest",
        )  # fmt: skip
        outline(axes[place], owner)
        axes[place].set_title(f"“{word}” looks here", fontsize=11)
        text = ",  ".join(f"{name} {100 * share:.0f} %" for name, share in shares(attention, owner))
        axes[place].set_xlabel(f"{text}\n{where}", color=MUTED, fontsize=8.6, labelpad=8)
    bar = figure.colorbar(heat, ax=axes, shrink=0.62, pad=0.015, aspect=26)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    bar.ax.set_title("of a patch", fontsize=8, color=MUTED)
    for part in axes:
        part.set_xticks([])
        part.set_yticks([])
        part.grid(False)
        for edge in part.spines.values():
            edge.set_visible(True)
            edge.set_color("#dcdfe3")
    return figure


def outline(axes: pyplot.Axes, owner: np.ndarray) -> None:
    """The patches of the red car, framed."""
    true = np.kron(patches_of(owner, [0], PATCH).reshape(SIZE // PATCH, -1), np.ones((8, 8)))
    fine = np.linspace(0, SIZE, len(true), endpoint=False) + SIZE / len(true) / 2
    axes.contour(fine, fine, np.pad(true, 0), levels=[0.5], colors=[INK], linewidths=1.1, linestyles=[(0, (3, 2))])


def heat_map() -> matplotlib.colors.Colormap:
    """From nothing to the red of the cars."""
    red = tuple(part / 255 for part in COLOURS["red"])
    stops = [(1.0, 0.72, 0.2, 0.0), (1.0, 0.6, 0.15, 0.55), (*red, 0.85)]
    return matplotlib.colors.LinearSegmentedColormap.from_list("heat", stops)


if __name__ == "__main__":
    main()
