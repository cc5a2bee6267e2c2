"""Loads a trained model from the folder of its run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..models.fusion_model import FusionModel
from ..models.self_contained import SelfContainedModel
from . import method_factory, recipes
from .checkpoint import load_weights
from .run import load_run_dataset
from .run_folder import PARTS, WEIGHTS, check_weights, read_run
from .run_spec import check_recipe


def load(folder: str | os.PathLike[str]) -> FusionModel | SelfContainedModel:
    """Loads a model trained by ``train`` or ``compare``, on the CPU, in evaluation mode, with its saved rotation.

    The data set of the recipe must be available, since it determines the shapes. No code from the folder is executed.
    To merge a rotation into the weights, call ``eq.merge_rotations`` on the model.

    Args:
        folder: folder of one run: ``--out`` of ``train``, or ``runs/<fold>/<method>/seed<n>`` in that of ``compare``.

    Raises:
        DataError: not the folder of a finished run, or a file in it is damaged or belongs to another run.
        ConfigError: the recipe no longer fits the data or the classes.

    Example:
        >>> import tempfile
        >>> from equipoise.training import RunSpec, execute_run
        >>> recipe = recipes.load_recipe("digits").with_train(epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = execute_run(RunSpec(recipe, "image", seed=0), Path(folder), trainer_options={"limit_train_batches": 1})
        ...     model = load(folder)
        >>> model.names, model.training
        (('image',), False)
    """
    folder = Path(folder)
    content = _content(folder)
    run = content["run"]
    recipe = recipes.load_recipe(folder / "recipe.yaml")
    with torch.random.fork_rng(devices=[]):
        model, _ = method_factory.build_model(
            method_factory.parse_method(run["method"], recipe), recipe, load_run_dataset(recipe, run["fold"])
        )
    load_weights(model, folder / WEIGHTS)
    # The weights of another run can have the same shapes.
    check_weights(folder, content)
    return model.eval()


def finished_run(folder: Path) -> dict[str, Any]:
    """Returns the finished run in a folder, as in ``results.json``.

    Raises:
        DataError: not the folder of a finished run, damaged, or files that belong to different runs.
    """
    return _content(folder)["run"]


def _content(folder: Path) -> dict[str, Any]:
    missing = [name for name in PARTS if not (folder / name).is_file()]
    if missing:
        inside = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("runs/*/*/seed*/run.json"))
        fix = "Give --out of equipoise train once it is done."
        if inside:
            fix = f"It contains {len(inside)} runs of a comparison; give one of them, such as '{folder / inside[0]}'."
        raise DataError("load", expected=f"the folder of a finished run, with {', '.join(PARTS)}",
                        got=f"'{folder}' without {', '.join(missing)}", fix=fix)  # fmt: skip
    content = read_run(folder)
    check_recipe(folder, content)
    return content
