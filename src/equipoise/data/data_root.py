"""Where data lie that are not bundled."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DataError

VARIABLE = "EQUIPOISE_DATA"


def find_data_dir(folder: str, root: str | Path | None, source: str) -> Path:
    """The folder, looked for under the environment's EQUIPOISE_DATA and then under ``root``.

    Args:
        folder: relative path, such as "fsdd/recordings".
        root: the recipe's folder, or None.
        source: one sentence that says what the folder holds and where it comes from.

    Raises:
        DataError: the folder is in neither place; says where it was looked for.
    """
    homes = [Path(home) for home in (os.environ.get(VARIABLE), root) if home]
    for home in homes:
        if (home / folder).is_dir():
            return home / folder
    raise DataError(
        folder, expected=f"a folder '{folder}' under {VARIABLE} or root",
        got="none in " + ", ".join(f"'{home}'" for home in homes) if homes else f"no {VARIABLE} and no root",
        fix=f"Set {VARIABLE} to the folder that contains '{folder}'. {source}",
    )  # fmt: skip
