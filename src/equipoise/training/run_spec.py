"""What a run is: a recipe, a method, a seed and a fold; and where it lives."""

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
    """What is run: everything that decides the result."""

    recipe: Recipe
    method: str
    seed: int
    fold: str | None = None

    def folder(self, out: Path) -> Path:
        """Where the run lives in the folder of its comparison."""
        return place(out, self.method, self.seed, self.fold)

    def fingerprint(self) -> str:
        """What must be unchanged for a finished or stopped run to count."""
        content = asdict(self.recipe)
        # What compare runs, and where the data lie, does not change what a run computes.
        for name in ("methods", "seeds", "folds", "reference", "references"):
            content.pop(name)
        content["data"].pop("root", None)
        if not content["model"]:
            # Runs of before there were other models count as well.
            for name in ("model", "variants"):
                content.pop(name)
        # Nor do variants that this method does not use.
        base, *balancers = (part.strip() for part in self.method.split("+"))
        if "variants" in content:
            content["variants"] = {k: v for k, v in content["variants"].items() if k == base}
        content["fusions"] = {k: v for k, v in content["fusions"].items() if k == base}
        content["balancers"] = {k: v for k, v in content["balancers"].items() if k in balancers}
        job = {"recipe": content, "method": self.method, "seed": self.seed, "fold": self.fold}
        return json.dumps(to_jsonable(job), sort_keys=True)


def place(out: Path, method: str, seed: int, fold: str | None) -> Path:
    """The folder of a run in the folder of its comparison.

    Raises:
        ConfigError: a method or fold whose name would lead elsewhere.
    """
    names = (
        check_path_component(fold or "all", "fold"),
        check_path_component(method, "method"),
        check_path_component(f"seed{seed}", "seed"),
    )
    return Path(out, "runs", *names)


def is_finished(job: RunSpec, folder: Path) -> RunResult | None:
    """The run that ``perform`` wrote into this folder, if it is whole and of the same recipe.

    Where ``run.json`` is missing or cut short, the run counts as stopped and goes on from its checkpoint.

    Raises:
        DataError: a run that was changed since it was written, or whose recipe or weights are of another run.
    """
    try:
        stored = read_json(folder / RUN)
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict) or stored.get("fingerprint") != job.fingerprint():
        return None
    content = read_run(folder)
    check_recipe(folder, content)
    check_weights(folder, content)
    return content["run"]


def check_recipe(folder: Path, content: dict[str, Any]) -> None:
    """Checks that the recipe in a folder is the one that its ``run.json`` was written with.

    Raises:
        DataError: another recipe.
    """
    run, path = content["run"], folder / RECIPE
    # What does not change the run, such as a comment, may change.
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
    """Checks that runs of a results file are the ones in the folders beside it, where there are folders.

    Raises:
        DataError: a run that says something else than its folder.
    """
    for run in runs:
        for inside in (place(folder, run["method"], run["seed"], run["fold"]), folder):
            if not (inside / RUN).is_file():
                continue
            stored = read_run(inside)["run"]
            same = all(stored[name] == run[name] for name in ("method", "seed", "fold"))
            if same and stored != to_jsonable(run):
                raise DataError(
                    str(folder / "results.json"), expected=f"what '{inside / RUN}' holds", got="another run there",
                    fix="Run the command that wrote them again; finished runs are not run again.",
                )  # fmt: skip
