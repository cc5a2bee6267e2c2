"""The folder of a run: its parts, how they are tied together, and what is told where they do not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError, SchemaError
from ..io.atomic_files import atomic_write, check_path_component, read_json, to_jsonable
from ..io.checksums import add_checksum, digest, verify_checksum
from ..io.typed_values import shorten_repr
from ..results.result_rows import RunResult
from ..results.results_schema import check_run

RUN, RECIPE, WEIGHTS = PARTS = ("run.json", "recipe.yaml", "model.safetensors")
AGAIN = "Remove it and start the run again; it goes on from its checkpoint."


def write_run(folder: Path, fingerprint: str, run: RunResult) -> None:
    """Writes ``run.json``, which says of which recipe and of which weights the run is.

    Call it last: a run is finished once this file is there.

    Args:
        folder: of the run, with recipe and weights in it.
        fingerprint: of its job.
        run: as in ``results.json``.
    """
    parts = {"recipe": digest(folder / RECIPE), "weights": digest(folder / WEIGHTS)}
    content = {"fingerprint": fingerprint, **parts, "run": run}
    atomic_write(folder / RUN, json.dumps(add_checksum(to_jsonable(content)), indent=1))


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
                check_path_component(content["run"][name], f"run.json, {name}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {shorten_repr(str(error).rstrip('.'))}"
        raise DataError(who, expected="a whole run", got=got, fix=AGAIN) from error
    try:
        content = verify_checksum(content, who, AGAIN)
        if "fingerprint" in content and "weights" not in content:
            raise SchemaError(who, expected="the digest of the weights", got="none", fix=AGAIN)
    except SchemaError as error:
        raise DataError(who, expected=error.expected, got=error.got, fix=AGAIN) from error
    return content


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
