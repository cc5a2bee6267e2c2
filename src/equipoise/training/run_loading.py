"""A trained model back from the folder of its run."""

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
    """The model that ``train`` or ``compare`` trained, on the CPU, in evaluation mode, rotated as it was.

    The recipe's data set tells the shapes, so the data must be there. Weights are read, nothing is executed. Where a
    rotation should be merged into the weights, call ``eq.merge_rotations`` on what comes back.

    Args:
        folder: of one run: ``--out`` of ``train``, or ``runs/<fold>/<method>/seed<n>`` in that of ``compare``.

    Raises:
        DataError: no folder of a finished run, or a file in it that is damaged or of another run.
        ConfigError: a recipe that no longer fits the data or the classes.

    Example:
        >>> import tempfile
        >>> from equipoise.training import RunSpec, execute_run
        >>> recipe = recipes.read("digits").with_train(epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = perform(Job(recipe, "image", seed=0), Path(folder), trainer_options={"limit_train_batches": 1})
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
    # Weights of another training can have the same shapes.
    check_weights(folder, content)
    return model.eval()


def finished_run(folder: Path) -> dict[str, Any]:
    """The finished run in this folder, as ``results.json`` holds it.

    Raises:
        DataError: no folder of a finished run, a damaged one, or one whose parts do not belong together.
    """
    return _content(folder)["run"]


def _content(folder: Path) -> dict[str, Any]:
    missing = [name for name in PARTS if not (folder / name).is_file()]
    if missing:
        inside = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("runs/*/*/seed*/run.json"))
        fix = "Give --out of equipoise train once it is done."
        if inside:
            fix = f"It holds {len(inside)} runs of a comparison; give one of them, such as '{folder / inside[0]}'."
        raise DataError("load", expected=f"the folder of a finished run, with {', '.join(PARTS)}",
                        got=f"'{folder}' without {', '.join(missing)}", fix=fix)  # fmt: skip
    content = read_run(folder)
    check_recipe(folder, content)
    return content
