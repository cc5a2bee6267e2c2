"""Samples of what a data set does not teach: its own held-out classes (near), or another task (far)."""

from __future__ import annotations

import copy

import torch

from ..errors import ConfigError, unknown_name
from .dataset import Dataset, Split
from .sets.far_ood import photo_patches, synthetic_sounds

FAR_SAMPLES = 1000
KINDS = ("near", "far")


def ood_split(source: Dataset, kind: str) -> Dataset:
    """The same data set with other things in the place of its test split; everything else is as it was.

    A loader of "test" then serves them as it serves the known classes, with the noise that belongs to the task, so
    that ``eq.diagnostics.ood(model, loader(source, "test", ...), loader(outside(source, "near"), "test", ...))`` compares both.

    Args:
        source: "av_digits" or "digits".
        kind: ``"near"``: the test split's samples of the classes in ``held_out``, heard and written as the others are.
            ``"far"``: 1,000 pieces of photographs, each with a chirp, a tone or a burst of noise, brought through the
            same principal components, log-mel and standardization.

    Returns:
        Dataset. Targets are no classes of the model: near, the classes' numbers before renumbering; far, -1.

    Raises:
        ConfigError: an unknown kind, near without held-out classes, far for data that are no pictures and sounds.

    Near is the harder question. A good figure for far says little: whatever differs in brightness or loudness is found.

    Reference: RollingQ (ICML 2025), Table 10, after MultiOOD (NeurIPS 2024); spec 8.7.
    Differs from the paper in: other data; near and far are asked of one model that knows the same classes.

    Example:
        >>> from equipoise.data import load_dataset
        >>> source = load_dataset("digits", held_out=[7, 8, 9])
        >>> outside(source, "near").test.target.unique(), len(outside(source, "far").test)
        (tensor([7, 8, 9]), 1000)
    """
    if kind not in KINDS:
        raise unknown_name("outside", "kind", str(kind), KINDS)
    view = copy.copy(source)
    view.test = _near(source) if kind == "near" else _far(source)
    return view


def _near(source: Dataset) -> Split:
    if source.outside is None:
        raise ConfigError(
            "outside", expected="a data set with held-out classes", got=f"{type(source).__name__} with none",
            fix="Load it with held_out, such as load_dataset('digits', held_out=[7, 8, 9]), and train on that.",
        )  # fmt: skip
    return source.outside


def _far(source: Dataset) -> Split:
    side = source.shapes.get("image", (1,))[-1]
    return Split(
        source.foreign(photo_patches(FAR_SAMPLES, side), synthetic_sounds(FAR_SAMPLES)), torch.full((FAR_SAMPLES,), -1)
    )
