"""Locates data sets that are not bundled with the package."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DataError

VARIABLE = "EQUIPOISE_DATA"


def find_data_dir(folder: str, root: str | Path | None, source: str) -> Path:
    """Finds a data folder under the environment variable EQUIPOISE_DATA, or else under ``root``.

    Args:
        folder: relative path, such as "fsdd/recordings".
        root: folder given in the recipe, or None.
        source: sentence on the content and origin of the folder, for the error message.

    Raises:
        DataError: the folder does not exist in either location; the message lists them.
    """
    roots = [Path(parent) for parent in (os.environ.get(VARIABLE), root) if parent]
    for parent in roots:
        if (parent / folder).is_dir():
            return parent / folder
    raise DataError(
        folder, expected=f"a folder '{folder}' under {VARIABLE} or root",
        got="none in " + ", ".join(f"'{parent}'" for parent in roots) if roots else f"no {VARIABLE} and no root",
        fix=f"Set {VARIABLE} to the folder that contains '{folder}'. {source}",
    )  # fmt: skip
