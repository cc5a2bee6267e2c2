"""Writes docs/methods.md: every balancer and every fusion, from the docstrings of the classes.

    python scripts/methods.py            # writes the page
    python scripts/methods.py --check    # only says whether it is up to date

A class says where it comes from in a line ``Reference: ...`` and what is changed in ``Differs from ... in: ...``. Which
published figures come out again is said here, beside the test that holds them.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

from equipoise import balance, fusion
from equipoise.balance import Balancer
from equipoise.fusion import Fusion
from equipoise.registry import available_classes

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
PACKAGE = ROOT / "src" / "equipoise"

TESTS = {"static_fusion": "fusion", "joint_attention": "fusion"}
"""File of a method -> the name of its tests, where it is another one."""

REPRODUCED = [
    ("JointAttention", "parameters of Vanilla MT on CREMA-D", "59,871,762, exactly", "test_cost.py"),
    ("JointAttention", "GFLOPs of it, by thop's way of counting", "1489.1288, to all digits", "test_cost.py"),
    ("RollingQ", "parameters and GFLOPs of it with a rotation", "60,461,586 and 1489.2043, exactly", "test_cost.py"),
    ("RollingQ", "a worked example: AIR, weights, anchor, rotation", "all digits", "test_rolling_step.py"),
    ("MBT", "parameters and GFLOPs with two bottleneck tokens", "114.21 M and 2746.90, all digits", "test_cost.py"),
    ("MMML", "parameters and GFLOPs", "77.88 M and 1828.29, with a head 384 wide", "test_cost.py"),
    ("JMT", "parameters and GFLOPs", "within 0.06 % and 0.04 %", "test_cost.py"),
]  # fmt: skip
"""Class, what was published, how close ours comes, and the test that holds it."""

HEADER = """\
# Methods

Every balancer and every fusion of the package, where it comes from, and what is different here. Balancers are combined
with fusions by name, such as `joint+rollingq`; `eq.BalancerList` combines them in a loop of your own.

This page is written by `python scripts/methods.py` from the classes' docstrings; a test holds it against them.
"""


def field(cls: type, name: str) -> str:
    """What a docstring says behind ``name:``, on one line; "" where it says nothing.

    The field ends at an empty line, or where another one begins.
    """
    lines = (inspect.getdoc(cls) or "").splitlines()
    found: list[str] = []
    for line in lines:
        begins = re.match(rf"(?:.*\. )?{name}: (.*)", line)
        if begins:
            found = [begins[1]]
        elif found and (not line.strip() or re.match(r"[A-Z][^.]*: ", line)):
            break
        elif found:
            found.append(line.strip())
    return " ".join(found)


def family(cls: type) -> str:
    """The subpackage that exports the class."""
    return cls.__module__.split(".")[1]


def source(cls: type) -> Path:
    """The class's file, from the root of the repository."""
    return Path(inspect.getfile(cls)).resolve().relative_to(ROOT)


def tests(cls: type) -> Path:
    """The tests of a class, from the root of the repository."""
    stem = source(cls).stem
    found = sorted((ROOT / "tests").rglob(f"test_{TESTS.get(stem, stem)}.py"))
    return found[0].relative_to(ROOT) if found else Path("tests") / f"test_{stem}.py"


def methods(package: ModuleType, base: type) -> dict[str, type]:
    """name in recipes -> class, by name."""
    return dict(sorted(available_classes(package, base).items(), key=lambda entry: entry[0]))


def table(found: dict[str, type]) -> list[str]:
    rows = ["| in recipes | class | from | file | tests |", "|---|---|---|---|---|"]
    for name, cls in found.items():
        file, test = source(cls), tests(cls)
        inside = file.relative_to("src/equipoise").with_suffix("")
        origin = re.sub(r"; spec [\d., and]+$", "", field(cls, "Reference").rstrip(".")).replace("|", "\\|")
        rows.append(
            f"| `{name}` | `eq.{family(cls)}.{cls.__name__}` | {origin} | [`{inside}`](../{file}) | [`{test.name}`](../{test}) |"
        )
    return rows


def differences(found: dict[str, type]) -> list[str]:
    """One line for each class, behind what it says it differs from."""
    said = []
    for name, cls in found.items():
        for other in ("the released code", "the paper"):
            if text := field(cls, f"Differs from {other} in"):
                said.append(f"* `{name}`, from {other} in: {text.replace('``', '`')}")
    return said


def page() -> str:
    balancers, fusions = methods(balance, Balancer), methods(fusion, Fusion)
    lines = [HEADER]
    for title, found in (("Balancers", balancers), ("Fusions", fusions)):
        lines += [f"## {title}", "", *table(found), ""]
    lines += ["## What is different here", "", *differences(balancers), *differences(fusions), ""]
    lines += [
        "## Published figures that come out again",
        "",
        "| class | published | here | test |",
        "|---|---|---|---|",
    ]
    for name, what, figure, test in REPRODUCED:
        lines.append(
            f"| `eq.{family(getattr(balance, name, None) or getattr(fusion, name))}.{name}` | {what} | {figure} "
            f"| [`{test}`](../{next((ROOT / 'tests').rglob(test)).relative_to(ROOT)}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/methods.md is out of date: run python scripts/methods.py")


if __name__ == "__main__":
    main()
