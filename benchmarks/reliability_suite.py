"""Table of eq.Reliability on real data sets: trains all methods, damages their inputs, and prints the table; resumes.

    python benchmarks/reliability_suite.py --out reliability                    # all sets, five seeds
    python benchmarks/reliability_suite.py --sets mosi utd_mhad --seeds 3 --out reliability
    python benchmarks/reliability_suite.py --sets av_digits --folds A,B,C --seeds 3 --out reliability

The steps can be run alone: ``equipoise compare`` trains, ``benchmarks/reliability.py`` measures, and
``benchmarks/reliability_table.py`` prints. Finished runs and measurements are not repeated, so that more seeds can be
added later. Set EQUIPOISE_DATA to the folder of the data.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from reliability_table import METHODS

from equipoise.training import comparison, recipes

SETS = ("mosi", "occupancy_detection", "utd_mhad", "occupancy_estimation")
"""Recipes, quickest first; others are given by ``--sets av_digits``."""


def call(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument(
        "--folds", type=lambda text: text.split(","), help="of each set; by default those of its recipe"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--severities", nargs="+", default=["4"])
    parser.add_argument("--most-val", default="400")
    parser.add_argument("--most-test", default="600")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    files = []
    for name in options.sets:
        recipe = recipes.load_recipe(name)
        folds = options.folds or recipe.folds
        comparison.compare(
            recipe, [*recipe.encoders, *METHODS], seeds=options.seeds, folds=folds, out=options.out / name,
            title=name, workers=0,
        )  # fmt: skip
        for fold in folds or ["all"]:
            file = options.out / (f"{name}.json" if fold == "all" else f"{name}_{fold}.json")
            call(
                "reliability.py", str(options.out / name), "--fold", fold, "--seeds", str(options.seeds),
                "--severities", *options.severities, "--most-val", options.most_val, "--most-test", options.most_test,
                "--out", str(file),
            )  # fmt: skip
            files.append(str(file))
    call("reliability_table.py", *files)


if __name__ == "__main__":
    main()
