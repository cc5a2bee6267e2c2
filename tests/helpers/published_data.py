"""Access to published data sets that are not part of the repository."""

import os
from pathlib import Path

import pytest

DATA = os.environ.get("EQUIPOISE_DATA", "")


def requires_data(*folders):
    """Returns a mark that skips a test unless EQUIPOISE_DATA contains all folders."""
    absent = [folder for folder in folders if not DATA or not (Path(DATA) / folder).is_dir()]
    return pytest.mark.skipif(bool(absent), reason=f"EQUIPOISE_DATA has no folder {', '.join(absent)}")
