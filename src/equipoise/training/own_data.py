"""Derives a recipe from a table of the user: encoders for its columns, training options, methods and controls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import Dataset
from ..data.sets.manifest import ManifestDataset, unreadable
from ..data.sets.stream import StreamDataset
from ..data.tables import Manifest
from ..data.tables.column_kinds import Modality
from ..data.user_code import dataset_from_code
from ..errors import ConfigError, unknown_name
from .recipes import Recipe, TrainOptions, load_recipe
from .run import CODE

DIM = 64
"""Token width of inferred encoders."""
STEPS = 1_500
"""Optimizer steps that the number of epochs aims at."""
PAIRS = "dual_encoder"
"""Recipe of pairs of columns."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
"""Files of which the folder of a tokenizer has one."""
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
    progress: Callable[[int, int], None] | None = None, base: Recipe | None = None,
    encoders: Mapping[str, Mapping[str, Any]] | None = None, readers: Mapping[str, Mapping[str, Any]] | None = None,
    streaming: bool = False,
) -> tuple[Recipe, list[str]]:  # fmt: skip
    """Reads a table, checks all of its files, and derives a recipe from it.

    Args:
        path: the table, see ``Manifest``.
        options: arguments of ``ManifestDataset``, such as ``target`` and ``group``.
        skip_bad: leave out rows with files that cannot be read instead of raising an error.
        progress: called with (rows checked, rows).
        base: with ``pair``, the recipe with the model and the training options, such as ``dual_encoder``.
        encoders: modality -> options of its encoder, which replace inferred ones. The images of a ``Backbone`` get its
            size and statistics and the texts its tokenizer; with ``pair`` it is frozen unless ``frozen`` or ``lora`` is
            given.
        readers: modality -> options of its reader, such as ``size`` of images and ``tokenizer`` of texts.
        streaming: read the rows in order, with bounded memory; see ``StreamDataset``.

    Returns:
        The recipe, with everything that was inferred written out, and sentences that describe it.

    Raises:
        DataError: the table or its files cannot be read. ConfigError: unknown column, kind or option.
    """
    data_options = dict(options or {})
    if "target" not in data_options and "pair" not in data_options:
        raise ConfigError(
            "--data", expected="the column of the target, or a pair of columns", got="none",
            fix="Add --target COLUMN, or --pair COLUMN,COLUMN to align columns.",
        )  # fmt: skip
    # A relative path would depend on the folder that a later command is started in.
    location = str(Path(path).resolve()) if Path(path).exists() else path
    chosen = {name: _absolute(one, "model") for name, one in (encoders or {}).items()}
    build = StreamDataset if streaming else ManifestDataset
    if readers or chosen:
        table: Manifest | StreamDataset
        if streaming:
            table = StreamDataset(location, **data_options)
        else:
            table = Manifest(
                location, **{k: v for k, v in data_options.items() if k not in ("folds", "fold", "seed", "skip")}
            )
        data_options["modalities"] = _reader_options(table.modalities, chosen, readers or {})
    source = build(location, **data_options)
    bad = source.check(progress)
    if bad and not skip_bad:
        raise unreadable(bad, _rows(source))
    if bad:
        data_options["skip"] = sorted({*data_options.get("skip", ()), *bad})
        source = build(location, **data_options)
    data_options.pop("kinds", None)
    data = {"name": "stream" if streaming else "manifest", "path": location, **data_options, "task": source.task,
            "modalities": source.options, "checksum": source.checksum()}  # fmt: skip
    if isinstance(source, ManifestDataset) and "pair" in data_options:
        recipe = _pair_recipe(source, data, base or load_recipe(PAIRS))
    else:
        recipe = _recipe(source, data)
    for name, one in chosen.items():
        encoder_options = recipe.encoders[name]
        replaced = one.get("name", encoder_options["name"]) != encoder_options["name"]
        recipe.encoders[name] = {**({} if replaced else encoder_options), **one}
        if replaced and one["name"] == "Backbone" and "pair" in data_options and not {"frozen", "lora"} & one.keys():
            recipe.encoders[name]["frozen"] = True
    return recipe, describe(source, recipe, bad)


def _absolute(options: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns options with the folder under a key as an absolute path."""
    folder = options.get(key)
    return {**options, **({key: str(Path(folder).resolve())} if folder and Path(str(folder)).is_dir() else {})}


def _rows(source: ManifestDataset | StreamDataset) -> int:
    return len(source.rows) if isinstance(source, StreamDataset) else len(source.manifest)


def _reader_options(
    modalities: Mapping[str, Modality], encoders: Mapping[str, Mapping[str, Any]],
    readers: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Returns the modalities of a table with options for their readers: those given, and those of backbones."""
    for name in (*encoders, *readers):
        if name not in modalities:
            raise unknown_name("--data", "modality", str(name), modalities)
    result = {}
    for name, one in modalities.items():
        folder = Path(str(encoders.get(name, {}).get("model", "")))
        follows: dict[str, Any] = {}
        if encoders.get(name, {}).get("name") == "Backbone":
            follows = _backbone_reader(name, one.kind, folder, {**one.options, **readers.get(name, {})})
        result[name] = {**one.to_dict(), **follows, **_absolute(readers.get(name, {}), "tokenizer")}
    return result


def _backbone_reader(name: str, kind: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with which a Hugging Face model reads a modality."""
    if kind == "text" and "tokenizer" not in options:
        if not any((folder / file).is_file() for file in TOKENIZER):
            raise ConfigError(
                f"encoder '{name}'", expected="the tokenizer of its model", got=f"none in '{folder}'",
                fix=f"Give its folder: --data.modalities.{name}.tokenizer FOLDER.",
            )  # fmt: skip
        return {"tokenizer": str(folder)}
    if kind != "image":
        return {}
    size = _json(folder / "config.json").get("image_size")
    statistics = _json(folder / "preprocessor_config.json")
    return {
        **({"size": size} if isinstance(size, int) else {}),
        **{key: statistics[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in statistics},
    }


def _json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file; {} if there is none, since other models have none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _pair_recipe(source: ManifestDataset, data: dict[str, Any], base: Recipe) -> Recipe:
    """Returns the recipe of a self-contained model with encoders and training options that fit a table."""
    if not base.model:
        raise ConfigError(
            "--pair",
            expected="a recipe with a model, such as dual_encoder",
            got=f"the methods {', '.join(base.methods)}",
            fix="Add --config dual_encoder, or give --target for a prediction.",
        )
    train, usual, fitting = base.train, TrainOptions(), pair_training(len(source.train))
    changes = {
        key: getattr(fitting, key) for key in ("epochs", "batch_size") if getattr(train, key) == getattr(usual, key)
    }
    encoders = {name: base.encoders.get(name, default_encoder(source, name)) for name in source.names}
    return replace(base, data=data, encoders=encoders, train=replace(train, **changes))


def pair_training(samples: int) -> TrainOptions:
    """Returns the number of epochs and samples per batch for a number of pairs; large batches have more negatives."""
    batch = next(size for size in (256, 128, 64, 32, 16, 8) if samples >= 4 * size or size == 8)
    return TrainOptions(epochs=min(60, max(3, round(STEPS / max(1, samples // batch)))), batch_size=batch)


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
        least = 4 if _kind(source, name) == "audio" else 1
        return {
            "name": "SequenceEncoder",
            "dim": DIM,
            "depth": 2,
            "heads": 4,
            "stride": max(least, -(-shape[0] // TOKENS)),
        }
    return {"name": "VectorEncoder", "dim": DIM}


def _kind(source: Dataset, name: str) -> str | None:
    """Returns the kind of a modality of a table; None for other data sets."""
    table = source.manifest if isinstance(source, ManifestDataset) else source
    return table.modalities[name].kind if isinstance(table, (Manifest, StreamDataset)) else None


def default_training(samples: int) -> TrainOptions:
    """Returns training options for a number of training samples."""
    batch = next(size for size in (64, 32, 16, 8) if samples >= 10 * size or size == 8)
    steps = max(1, samples // batch)
    return TrainOptions(epochs=min(60, max(3, round(STEPS / steps))), batch_size=batch, clip=1.0)


def describe(source: ManifestDataset | StreamDataset, recipe: Recipe, bad: Mapping[int, Sequence[str]]) -> list[str]:
    """Returns sentences about the table and what was inferred from it."""
    lines = source.describe() if isinstance(source, StreamDataset) else source.manifest.describe()
    lines += _encoder_lines(source, recipe)
    sizes = ", ".join(f"{name} {len(source.split(name))}" for name in ("train", "val", "test"))
    by = source.split_title() if isinstance(source, StreamDataset) else source.manifest.split_title()
    lines.append(f"rows: {sizes} (split by {by})")
    if bad:
        lines.append(f"left out: {len(bad)} rows with files that cannot be read: {unreadable(bad, 0).got}")
    return lines


def _encoder_lines(source: Dataset, recipe: Recipe) -> list[str]:
    return [
        f"{name}: {one['name']} for samples of shape {source.shapes[name]}" for name, one in recipe.encoders.items()
    ]
