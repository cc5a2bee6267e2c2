"""Out-of-distribution test splits: held-out classes of the same data (near), or inputs of another task (far)."""

from __future__ import annotations

import copy

import torch

from ..errors import ConfigError, unknown_name
from .dataset import Dataset, Split
from .sets.far_ood import photo_patches, synthetic_sounds

FAR_SAMPLES = 1000
KINDS = ("near", "far")


def ood_split(source: Dataset, kind: str) -> Dataset:
    """Returns the data set with its test split replaced by out-of-distribution samples.

    A loader of "test" then applies the same noise as for the known classes, so that
    ``eq.diagnostics.ood(model, loader(source, "test", ...), loader(ood_split(source, "near"), "test", ...))`` compares
    both.

    Args:
        source: "av_digits" or "digits".
        kind: ``"near"``: the test samples of the classes in ``held_out``, by the same speakers and writers.
            ``"far"``: 1,000 crops of photographs, each with a chirp, a tone or a burst of noise, processed by the same
            principal components, log-mel transform and standardization.

    Returns:
        Dataset. Its targets are not classes of the model: the original class indices for near, -1 for far.

    Raises:
        ConfigError: unknown kind, near without held-out classes, or far for data without images and sounds.

    Near is the harder test. A good score on far means little: any difference in brightness or loudness is detected.

    Reference: RollingQ (ICML 2025), Table 10, after MultiOOD (NeurIPS 2024).
    Differs from the paper in: other data; near and far are tested on the same model.

    Example:
        >>> from equipoise.data import load_dataset
        >>> source = load_dataset("digits", held_out=[7, 8, 9])
        >>> ood_split(source, "near").test.target.unique(), len(ood_split(source, "far").test)
        (tensor([7, 8, 9]), 1000)
    """
    if kind not in KINDS:
        raise unknown_name("ood_split", "kind", str(kind), KINDS)
    view = copy.copy(source)
    view.test = _near(source) if kind == "near" else _far(source)
    return view


def _near(source: Dataset) -> Split:
    if source.near_ood is None:
        raise ConfigError(
            "ood_split", expected="a data set with held-out classes", got=f"{type(source).__name__} with none",
            fix="Load it with held_out, such as load_dataset('digits', held_out=[7, 8, 9]), and train on that.",
        )  # fmt: skip
    return source.near_ood


def _far(source: Dataset) -> Split:
    side = source.shapes.get("image", (1,))[-1]
    return Split(
        source.far_ood_inputs(photo_patches(FAR_SAMPLES, side), synthetic_sounds(FAR_SAMPLES)),
        torch.full((FAR_SAMPLES,), -1),
    )
