"""Loads a trained model from the folder of its run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset
from ..data.user_code import is_code
from ..diagnostics.suite import Diagnosis
from ..errors import ConfigError, DataError
from ..models.fusion_model import FusionModel
from ..models.self_contained import SelfContainedModel
from ..models.sharing.hub_methods import HUB_ID, find_pretrained, is_pretrained, load_pretrained
from ..reliability import Reliability
from . import method_factory, recipes
from .checkpoint import load_weights
from .run import CODE, load_run_dataset
from .run_folder import PARTS, WEIGHTS, check_weights, read_run
from .run_spec import check_recipe


def load(
    folder: str | os.PathLike[str], *, data: str | os.PathLike[str] | Dataset | None = None
) -> FusionModel | SelfContainedModel | Reliability:
    """Loads a model trained by ``train`` or ``compare``, on the CPU, in evaluation mode, with its saved rotation.

    Also loads what ``save_pretrained`` and ``push_to_hub`` saved: ``eq.load("user/name")`` downloads a model from the
    Hugging Face Hub if there is no such folder. The data set of the recipe must be available for the folder of a run,
    since it determines the shapes; other folders need no data. No code from the folder is executed. To merge a rotation
    into the weights, call ``eq.merge_rotations`` on the model. A method with ``+reliability`` is loaded as
    ``eq.Reliability``, fitted.

    Args:
        folder: folder of one run: ``--out`` of ``train``, or ``runs/<fold>/<method>/seed<n>`` in that of ``compare``;
            or a folder of ``save_pretrained``, or the name of a model on the Hub.
        data: the data set, if it was moved or is not named by the recipe: the new path of the table, or a ``Dataset``.

    Raises:
        DataError: not the folder of a finished run, or a file in it is damaged or belongs to another run.
        ConfigError: the recipe no longer fits the data or the classes, or ``data`` for a model that needs none.
        MissingExtraError: a name on the Hub without ``huggingface_hub``.

    Example:
        >>> import tempfile
        >>> from equipoise.training import RunSpec, execute_run
        >>> recipe = recipes.load_recipe("digits").with_train(epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     spec, options = RunSpec(recipe, "image", seed=0), {"limit_train_batches": 1}
        ...     _ = execute_run(spec, Path(folder), trainer_options=options)
        ...     model = load(folder)
        >>> model.names, model.training
        (('image',), False)
    """
    folder = find_pretrained(folder) if HUB_ID.fullmatch(os.fspath(folder)) else Path(folder)
    if is_pretrained(folder):
        if data is not None:
            raise ConfigError(
                "load", expected="no data for a model of save_pretrained", got="data", fix="Leave it out."
            )
        return load_pretrained(folder)
    content = _content(folder)
    run = content["run"]
    recipe = recipes.load_recipe(folder / "recipe.yaml")
    source = data if isinstance(data, Dataset) else load_run_dataset(with_data(recipe, data), run["fold"])
    method = method_factory.parse_method(run["method"], recipe)
    with torch.random.fork_rng(devices=[]):
        built, _ = method_factory.build_model(method, recipe, source)
    model: Any = method_factory.wrap_reliability(built, method, recipe) if method.reliable else built  # type: ignore[arg-type]
    load_weights(model, folder / WEIGHTS)
    # The weights of another run can have the same shapes.
    check_weights(folder, content)
    model.shared_from = {"run": run, "diagnosis": _diagnosis(folder)}
    return model.eval()


def _diagnosis(folder: Path) -> Diagnosis | None:
    """Returns the diagnosis of a run, which ``equipoise diagnose`` wrote to its folder; None if there is none."""
    path = folder / "diagnosis"
    return Diagnosis.load(path) if (path / "diagnosis.json").is_file() else None


def with_data(recipe: recipes.Recipe, location: str | os.PathLike[str] | None) -> recipes.Recipe:
    """Returns the recipe with another location of its data: a table, the root of a data set, or Python code.

    Raises:
        ConfigError: the data set of the recipe has no location, or is of another kind.
    """
    if location is None:
        return recipe
    text = os.fspath(location)
    kinds = {"manifest": "path", "stream": "path", CODE: "source"}
    key = kinds.get(recipe.data["name"], "root")
    if is_code(text) != (recipe.data["name"] == CODE):
        raise ConfigError(
            "--data", expected=f"a location of the data set '{recipe.data['name']}' of the run", got=f"'{text}'"
        )
    if key == "path" and os.path.exists(text):
        text = os.path.abspath(text)
    return replace(recipe, data={**recipe.data, key: text})


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
