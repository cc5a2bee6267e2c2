"""Methods on all 15 pairs of test speakers of av_digits, with speakers as a random factor; resumes.

    python benchmarks/speaker_pairs.py --out pairs                      # 45 runs, about 45 minutes on one core
    python benchmarks/speaker_pairs.py --methods concat,joint,joint+rollingq --out pairs_rollingq

Each method is trained for each pair of speakers, who are not in its training and validation split. A method is compared
with its control on the same pairs. Two pairs that share a speaker are not independent, so that the standard error is
that of the jackknife over speakers: the mean difference is a U-statistic of the speakers, and

    se^2 = 5 / 6  sum over speakers s of (mean of the 10 pairs without s - mean of these means over s)^2,

and t has 5 degrees of freedom.

The column "pairs" has the p-value of a t-test that takes the 15 pairs for independent.
Set EQUIPOISE_DATA to the folder of the data."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from scipy import stats

from equipoise.data.sets.av_digits import SPEAKERS
from equipoise.results.result_rows import paired, run_pairs
from equipoise.training import comparison, recipes

METHODS = "concat_aux+corruption,concat_ensemble+corruption,ensemble+corruption"
METRICS = ("accuracy", "accuracy_noise/audio", "accuracy_noise/image")


def jackknife_p(differences: Mapping[tuple[str, str], Sequence[float]], members: Sequence[str]) -> float:
    """Returns the two-sided p-value of no difference, with the members of the pairs as a random factor.

    NaN if all differences are equal.

    >>> pairs = list(combinations("abcd", 2))
    >>> round(jackknife_p({pair: [1.0 + ("a" in pair)] for pair in pairs}, "abcd"), 3)
    0.058
    """
    left = [
        statistics.mean(value for pair, values in differences.items() if name not in pair for value in values)
        for name in members
    ]
    center, count = statistics.mean(left), len(members)
    error = ((count - 1) / count * sum((value - center) ** 2 for value in left)) ** 0.5
    mean = statistics.mean(value for values in differences.values() for value in values)
    return float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="parallel processes; 0 runs in this process")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    recipe = recipes.load_recipe("av_digits")
    pairs = list(combinations(SPEAKERS, 2))
    content = comparison.compare(
        recipe, options.methods.split(","), seeds=options.seeds, folds=["-".join(pair) for pair in pairs],
        out=options.out, title="av_digits", workers=options.workers,
    )  # fmt: skip
    references = {(row["method"], row["metric"]): row for row in content["summary"]}
    print("| method | control | metric | mean | difference | p, speakers | p, pairs | higher |")
    print("|---|---|---|---|---|---|---|---|")
    for (method, metric), row in references.items():
        if metric not in METRICS:
            continue
        cells = [method, row["reference"] or "", metric, f"{100 * row['mean']:.1f} ± {100 * (row['sd'] or 0):.1f}"]
        if row["reference"]:
            found: dict[tuple[str, str], list[float]] = {}
            for run, other in run_pairs(content["runs"], method, row["reference"], metric):
                first, second = str(run["fold"]).split("-")
                change = float(run["metrics"][metric] or 0) - float(other["metrics"][metric] or 0)
                found.setdefault((first, second), []).append(change)
            means = [statistics.mean(values) for values in found.values()]
            test = paired(means)
            cells += [
                f"{100 * statistics.mean(means):+.1f}", f"{jackknife_p(found, SPEAKERS):.3f}",
                f"{math.nan if test['p'] is None else test['p']:.3f}",
                f"{test['higher']} of {test['pairs']}",
            ]  # fmt: skip
        else:
            cells += [""] * 4
        print(f"| {' | '.join(cells)} |".replace(" -", " −"))


if __name__ == "__main__":
    main()
