"""Specification of a run (recipe, method, seed, fold), and its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, EquipoiseError
from ..io.atomic_files import check_path_component, read_json, to_jsonable
from ..io.checksums import digest
from ..results.result_rows import RunResult
from . import recipes
from .recipes import Recipe
from .run_folder import RECIPE, RUN, check_weights, read_run


@dataclass(frozen=True)
class RunSpec:
    """Specification of a run: everything that determines its result."""

    recipe: Recipe
    method: str
    seed: int
    fold: str | None = None

    def folder(self, out: Path) -> Path:
        """Returns the folder of the run in the folder of its comparison."""
        return run_folder(out, self.method, self.seed, self.fold)

    def fingerprint(self) -> str:
        """Returns a string that must match for a finished or interrupted run to be reused."""
        content = asdict(self.recipe)
        # The methods of compare, the loggers and the location of the data do not change the result of a run.
        for name in ("methods", "seeds", "folds", "reference", "references", "logger"):
            content.pop(name)
        content["data"].pop("root", None)
        if content["data"].get("checksum"):
            content["data"].pop("path")
        for name in ("workers", "checkpoint_steps", "gradient_checkpointing"):
            content["train"].pop(name)
        if not content["metrics"]:
            # Keep fingerprints compatible with runs made before `metrics` existed.
            content.pop("metrics")
        for name in ("test_corruptions", "left_out"):
            if not content[name]:
                content.pop(name)
        if not content["model"]:
            # Keep fingerprints compatible with runs made before `model` and `variants` existed.
            for name in ("model", "variants"):
                content.pop(name)
        # Variants that this method does not use are irrelevant as well.
        base, *balancers = (part.strip() for part in self.method.split("+"))
        if "variants" in content:
            content["variants"] = {k: v for k, v in content["variants"].items() if k == base}
        content["fusions"] = {k: v for k, v in content["fusions"].items() if k == base}
        content["balancers"] = {k: v for k, v in content["balancers"].items() if k in balancers}
        job = {"recipe": content, "method": self.method, "seed": self.seed, "fold": self.fold}
        return json.dumps(to_jsonable(job), sort_keys=True)


def run_folder(out: Path, method: str, seed: int, fold: str | None) -> Path:
    """Returns the folder of a run in the folder of its comparison.

    Raises:
        ConfigError: the method or fold is not a valid path component.
    """
    names = (
        check_path_component(fold or "all", "fold"),
        check_path_component(method, "method"),
        check_path_component(f"seed{seed}", "seed"),
    )
    return Path(out, "runs", *names)


def is_finished(job: RunSpec, folder: Path) -> RunResult | None:
    """Returns the run that ``execute_run`` wrote to this folder, or None if it is incomplete or of another recipe.

    If ``run.json`` is missing or truncated, the run counts as interrupted and resumes from its checkpoint.

    Raises:
        DataError: the run was changed after it was written, or its recipe or weights belong to another run.
    """
    try:
        stored = read_json(folder / RUN)
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict) or stored.get("fingerprint") != job.fingerprint():
        return None
    content = read_run(folder, stored)
    check_recipe(folder, content)
    check_weights(folder, content)
    return content["run"]


def check_recipe(folder: Path, content: dict[str, Any]) -> None:
    """Checks the recipe in a folder against ``run.json``.

    Raises:
        DataError: the recipe differs.
    """
    run, path = content["run"], folder / RECIPE
    # Changes that do not affect the run, such as comments, are allowed.
    if "fingerprint" in content and path.is_file() and digest(path) != content.get("recipe"):
        try:
            recipe = recipes.load_recipe(path)
            same = RunSpec(recipe, run["method"], run["seed"], run["fold"]).fingerprint() == content["fingerprint"]
        except EquipoiseError as error:
            raise DataError(
                str(path), expected=f"the recipe of this run; {error.expected}", got=error.got,
                fix="Put back the file that the training wrote.",
            ) from error  # fmt: skip
        if not same:
            raise DataError(
                str(path), expected="the recipe that this run was trained with",
                got="another one: recipe.yaml or run.json was changed, or is of another run",
                fix="Put back the file that the training wrote, or train again in a new folder.",
            )  # fmt: skip


def check_against(folder: Path, runs: list[RunResult]) -> None:
    """Checks the runs of a results file against the run folders next to it, if there are any.

    Raises:
        DataError: a run differs from the one in its folder.
    """
    for run in runs:
        for inside in (run_folder(folder, run["method"], run["seed"], run["fold"]), folder):
            if not (inside / RUN).is_file():
                continue
            stored = read_run(inside)["run"]
            same = all(stored[name] == run[name] for name in ("method", "seed", "fold"))
            if same and stored != to_jsonable(run):
                raise DataError(
                    str(folder / "results.json"),
                    expected=f"the content of '{inside / RUN}'",
                    got="a different run there",
                    fix="Run the command that wrote them again; finished runs are not run again.",
                )
