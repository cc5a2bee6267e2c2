"""The folder of a run: its parts, how they are tied together, and what is told where they do not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import recipes
from ..errors import DataError, EquipoiseError, SchemaError
from ..files import digest, path_part, plain, read_json, sealed, unsealed, write_whole
from ..record import Run
from ..results_schema import check_run
from ..typed import shown

if TYPE_CHECKING:
    from .job import Job

RUN, RECIPE, WEIGHTS = PARTS = ("run.json", "recipe.yaml", "model.safetensors")
AGAIN = "Remove it and start the run again; it goes on from its checkpoint."


def write_run(folder: Path, job: Job, run: Run) -> None:
    """Writes ``run.json``, which says of which recipe and of which weights the run is.

    Call it last: a run is finished once this file is there.
    """
    parts = {"recipe": digest(folder / RECIPE), "weights": digest(folder / WEIGHTS)}
    content = {"fingerprint": job.fingerprint(), **parts, "run": run}
    write_whole(folder / RUN, json.dumps(sealed(plain(content)), indent=1))


def read_run(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``.

    Raises:
        DataError: a file that is damaged, or that was changed since it was written.
    """
    who = f"load '{folder / RUN}'"
    try:
        content = read_json(folder / RUN)
        check_run(content["run"], "run.json")
        for name in ("method", "fold"):
            if content["run"][name] is not None:
                path_part(content["run"][name], f"run.json, {name}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {shown(str(error).rstrip('.'))}"
        raise DataError(who, expected="a whole run", got=got, fix=AGAIN) from error
    try:
        content = unsealed(content, who, AGAIN)
        if "fingerprint" in content and "weights" not in content:
            raise SchemaError(who, expected="the digest of the weights", got="none", fix=AGAIN)
    except SchemaError as error:
        raise DataError(who, expected=error.expected, got=error.got, fix=AGAIN) from error
    return content


def check_recipe(folder: Path, content: dict[str, Any]) -> None:
    """Checks that the recipe in a folder is the one that its ``run.json`` was written with.

    Raises:
        DataError: another recipe.
    """
    from .job import Job

    run, path = content["run"], folder / RECIPE
    # What does not change the run, such as a comment, may change.
    if "fingerprint" in content and path.is_file() and digest(path) != content.get("recipe"):
        try:
            recipe = recipes.read(path)
            same = Job(recipe, run["method"], run["seed"], run["fold"]).fingerprint() == content["fingerprint"]
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


def check_weights(folder: Path, content: dict[str, Any]) -> None:
    """Checks that the weights in a folder are the ones that its ``run.json`` was written with.

    Raises:
        DataError: other weights.
    """
    weights = folder / WEIGHTS
    if "weights" in content and weights.is_file() and digest(weights) != content["weights"]:
        raise DataError(
            str(weights), expected="the weights of this run, whole", got="others: damaged, or copied from another run",
            fix="Put back the file that the training wrote, or remove run.json and start the run again.",
        )  # fmt: skip


def check_against(folder: Path, runs: list[Run]) -> None:
    """Checks that runs of a results file are the ones in the folders beside it, where there are folders.

    Raises:
        DataError: a run that says something else than its folder.
    """
    from .job import place

    for run in runs:
        for inside in (place(folder, run["method"], run["seed"], run["fold"]), folder):
            if not (inside / RUN).is_file():
                continue
            stored = read_run(inside)["run"]
            same = all(stored[name] == run[name] for name in ("method", "seed", "fold"))
            if same and stored != plain(run):
                raise DataError(
                    str(folder / "results.json"), expected=f"what '{inside / RUN}' holds", got="another run there",
                    fix="Run the command that wrote them again; finished runs are not run again.",
                )  # fmt: skip
