"""Files in the folder of a run, and the digests that verify that they belong together."""

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
AGAIN = "Remove it and start the run again; it resumes from its checkpoint."


def write_run(folder: Path, fingerprint: str, run: RunResult) -> None:
    """Writes ``run.json`` with the digests of the recipe and the weights.

    Call it last: a run counts as finished once this file exists.

    Args:
        folder: folder of the run, which contains the recipe and the weights.
        fingerprint: fingerprint of its ``RunSpec``.
        run: run as in ``results.json``.
    """
    parts = {"recipe": digest(folder / RECIPE), "weights": digest(folder / WEIGHTS)}
    content = {"fingerprint": fingerprint, **parts, "run": run}
    atomic_write(folder / RUN, json.dumps(add_checksum(to_jsonable(content)), indent=1))


def read_run(folder: Path, content: Any = None) -> dict[str, Any]:
    """Loads ``run.json``, or checks its content if it was read already.

    Raises:
        DataError: the file is damaged or was changed after it was written.
    """
    who = f"load '{folder / RUN}'"
    try:
        content = read_json(folder / RUN) if content is None else content
        check_run(content["run"], "run.json")
        for name in ("method", "fold"):
            if content["run"][name] is not None:
                check_path_component(content["run"][name], f"run.json, {name}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {shorten_repr(str(error).rstrip('.'))}"
        raise DataError(who, expected="a complete run", got=got, fix=AGAIN) from error
    try:
        content = verify_checksum(content, who, AGAIN)
        if "fingerprint" in content and "weights" not in content:
            raise SchemaError(who, expected="the digest of the weights", got="none", fix=AGAIN)
    except SchemaError as error:
        raise DataError(who, expected=error.expected, got=error.got, fix=AGAIN) from error
    return content


def check_weights(folder: Path, content: dict[str, Any]) -> None:
    """Checks the weights in a folder against the digest in ``run.json``.

    Raises:
        DataError: the weights differ.
    """
    weights = folder / WEIGHTS
    if "weights" in content and weights.is_file() and digest(weights) != content["weights"]:
        raise DataError(
            str(weights), expected="the weights of this run", got="other weights: damaged, or copied from another run",
            fix="Put back the file that the training wrote, or remove run.json and start the run again.",
        )  # fmt: skip
