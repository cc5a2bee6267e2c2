"""Writes docs/balancer_matrix.md: every balancer in every disturbed loop of tests/helpers/balancer_disturbances.py."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from equipoise.errors import EquipoiseError  # noqa: E402
from helpers.balancer_cases import BALANCERS  # noqa: E402
from helpers.balancer_disturbances import DISTURBANCES, REFUSED, shared  # noqa: E402

INTRODUCTION = """# Balancers in disturbed loops

Each row is a training loop that is disturbed in some way. For every balancer the tests compare the weights and the log
after two epochs with those of the same loop without the disturbance, in float64: they are equal, except where the
last column names balancers that refuse the loop with an error which says what to do.

Written by `scripts/balancer_matrix.py`; `tests/balance/test_faults_balancers.py` holds every cell.
"""


def page() -> str:
    """The text of the page."""
    names = sorted(BALANCERS)
    lines = [INTRODUCTION, "| loop | what happens | refused by |", "|---|---|---|"]
    for name, kind in DISTURBANCES.items():
        refused = [each for each in names if each in REFUSED.get(name, ())]
        text = " ".join((kind.__doc__ or "").split())
        lines.append(f"| `{name}` | {text} | {_listed(refused)} |")
    apart = [name for name in names if isinstance(shared(name), EquipoiseError)]
    lines.append(
        f"| `shared encoder` | Two modalities have one encoder: training, saving and loading work. | {_listed(apart)} |"
    )
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    (ROOT / "docs" / "balancer_matrix.md").write_text(page(), encoding="utf-8")
