"""Derives a recipe from a table of the user: encoders for its columns, training options, methods and controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Dataset
from ..data.sets.manifest import ManifestDataset, unreadable
from ..data.user_code import dataset_from_code
from ..errors import ConfigError
from .recipes import Recipe, TrainOptions
from .run import CODE

DIM = 64
"""Token width of inferred encoders."""
STEPS = 1_500
"""Optimizer steps that the number of epochs aims at."""
TOKENS = 64
"""Largest number of tokens of an inferred sequence encoder."""

FUSIONS: dict[str, dict[str, Any]] = {
    "ensemble": {"fusion": "joint", "train": {"unimodal": "ensemble"}},
    "concat_aux": {"fusion": "concat", "train": {"unimodal": "train"}},
}
FUSED = ["concat", "joint", "joint+rollingq", "concat_aux+corruption", "ensemble+corruption"]
REFERENCES = {"joint+rollingq": "joint", "ensemble+corruption": "concat_aux+corruption"}


def own_data_recipe(
    path: str, *, options: Mapping[str, Any] | None = None, skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Recipe, list[str]]:  # fmt: skip
    """Reads a table, checks all of its files, and derives a recipe from it.

    Args:
        path: the table, see ``Manifest``.
        options: arguments of ``ManifestDataset``, such as ``target`` and ``group``.
        skip_bad: leave out rows with files that cannot be read instead of raising an error.
        progress: called with (rows checked, rows).

    Returns:
        The recipe, with everything that was inferred written out, and sentences that describe it.

    Raises:
        DataError: the table or its files cannot be read. ConfigError: unknown column, kind or option.
    """
    given = dict(options or {})
    if "target" not in given:
        raise ConfigError("--data", expected="the column of the target", got="none", fix="Add --target COLUMN.")
    # A relative path would depend on the folder that a later command is started in.
    location = str(Path(path).resolve()) if Path(path).exists() else path
    source = ManifestDataset(location, **given)
    bad = source.check(progress)
    if bad and not skip_bad:
        raise unreadable(bad, len(source.manifest))
    if bad:
        given["skip"] = sorted({*given.get("skip", ()), *bad})
        source = ManifestDataset(location, **given)
    given.pop("kinds", None)
    data = {"name": "manifest", "path": location, **given, "task": source.task, "modalities": source.options,
            "checksum": source.manifest.checksum()}  # fmt: skip
    recipe = _recipe(source, data)
    return recipe, describe(source, recipe, bad)


def recipe_for(source: str) -> tuple[Recipe, list[str]]:
    """Derives a recipe for the data set that a Python function makes; see ``dataset_from_code``."""
    dataset = dataset_from_code(source)
    recipe = _recipe(dataset, {"name": CODE, "source": source})
    lines = [f"target: {dataset.task}, {dataset.num_outputs} outputs", *_encoder_lines(dataset, recipe)]
    sizes = ", ".join(f"{name} {len(dataset.split(name))}" for name in ("train", "val", "test"))
    return recipe, [*lines, f"samples: {sizes}"]


def _recipe(source: Dataset, data: dict[str, Any]) -> Recipe:
    several = len(source.names) > 1
    return Recipe(
        data=data, encoders={name: default_encoder(source, name) for name in source.names},
        methods=[*source.names, *FUSED] if several else list(source.names),
        fusions=FUSIONS if several else {}, references=REFERENCES if several else {},
        train=default_training(len(source.train)),
    )  # fmt: skip


def default_encoder(source: Dataset, name: str) -> dict[str, Any]:
    """Returns the encoder of a modality for a recipe, chosen by the shape of its samples."""
    shape = source.shapes[name]
    if name in source.vocabulary:
        return {"name": "TextEncoder", "dim": DIM, "depth": 1, "heads": 4, "dropout": 0.1}
    if len(shape) == 4:
        return {"name": "ViTEncoder", "dim": DIM, "depth": 2, "heads": 4, "patch": max(1, shape[-1] // 4)}
    if len(shape) == 3:
        return {"name": "ConvEncoder", "dim": DIM, "widths": [32, 64, 128]}
    if len(shape) == 2:
        # Neighboring spectrogram frames overlap: at least four form a token.
        least = 4 if isinstance(source, ManifestDataset) and source.manifest.modalities[name].kind == "audio" else 1
        return {
            "name": "SequenceEncoder",
            "dim": DIM,
            "depth": 2,
            "heads": 4,
            "stride": max(least, -(-shape[0] // TOKENS)),
        }
    return {"name": "VectorEncoder", "dim": DIM}


def default_training(samples: int) -> TrainOptions:
    """Returns training options for a number of training samples."""
    batch = next(size for size in (64, 32, 16, 8) if samples >= 10 * size or size == 8)
    steps = max(1, samples // batch)
    return TrainOptions(epochs=min(60, max(3, round(STEPS / steps))), batch_size=batch, clip=1.0)


def describe(source: ManifestDataset, recipe: Recipe, bad: Mapping[int, Sequence[str]]) -> list[str]:
    """Returns sentences about the table and what was inferred from it."""
    lines = source.manifest.describe()
    lines += _encoder_lines(source, recipe)
    sizes = ", ".join(f"{name} {len(rows)}" for name, rows in source.rows.items())
    by = (
        f"column '{source.manifest.split}'"
        if source.manifest.split
        else (f"groups of '{source.manifest.group}'" if source.manifest.group else "random rows")
    )
    lines.append(f"rows: {sizes} (split by {by})")
    if bad:
        lines.append(f"left out: {len(bad)} rows with files that cannot be read: {unreadable(bad, 0).got}")
    return lines


def _encoder_lines(source: Dataset, recipe: Recipe) -> list[str]:
    return [
        f"{name}: {one['name']} for samples of shape {source.shapes[name]}" for name, one in recipe.encoders.items()
    ]
