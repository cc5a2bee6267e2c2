"""Table of the results of benchmarks/reliability.py: accuracy under damage, and paired tests.

    python benchmarks/reliability_table.py utd_mhad.json occupancy_estimation.json

"Best single" is the modality that is most accurate alone, on clean inputs; "best intact" is, for each damage, the best
of the modalities that it leaves intact, alone: the accuracy of a perfect detector of damage.

p-values compare each method with the control (concat_aux+corruption without reliability) on the same test samples: the
difference of the mean outcomes of each sample over seeds and damages, with the bootstrap of
equipoise.results.significance. They are corrected by Holm's method over all methods and sets of the table.

"p, groups" is not corrected. It has the groups of test samples (subjects, speakers) as a random factor, see grouped_p
in the same module; it is missing for data without groups, or with fewer than three."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.results.significance import bootstrap_p, grouped_p, holm

CONTROL = "concat_aux+corruption"
METHODS = (
    "concat", "concat+qmf", "concat_aux", CONTROL, "concat_aux+modality_dropout", "joint", "joint+rollingq",
    "ensemble+corruption",
)  # fmt: skip
NOISE = ("white_noise", "own_noise", "partial", "additive")


def mean(values: Any) -> float:
    return 100 * statistics.mean(values)


def row(content: dict[str, Any], runs: list[dict[str, Any]], which: int) -> list[float]:
    """Percentages: clean, seen and unseen damage, worst unseen damage, share within two points of the best intact."""
    names = {key.split("/")[0] for key in runs[0]["damaged"]}
    alone = {name: statistics.mean(content["alone"][name].values()) for name in names}
    parts: dict[str, list[float]] = {"seen": [], "unseen": []}
    near = []
    for key in runs[0]["damaged"]:
        name, corruption, _ = key.split("/")
        score = statistics.mean(run["damaged"][key][which] for run in runs)
        parts["seen" if corruption in NOISE else "unseen"].append(score)
        near.append(score >= max(value for other, value in alone.items() if other != name) - 0.02)
    clean = statistics.mean(run["clean"][which] for run in runs)
    return [100 * clean, mean(parts["seen"]), mean(parts["unseen"]), 100 * min(parts["unseen"]), mean(near)]


def alone_rows(content: dict[str, Any]) -> list[tuple[str, int, list[str]]]:
    """Rows of the best single modality, and of the best intact one averaged over damages."""
    damaged = next(iter(next(iter(content["runs"].values())).values()))["damaged"]
    names = {key.split("/")[0] for key in damaged}
    # Fusions without balancers are listed there as well.
    alone = {name: statistics.mean(values.values()) for name, values in content["alone"].items() if name in names}
    best = max(alone, key=alone.__getitem__)
    parts: dict[bool, list[float]] = {True: [], False: []}
    for key in damaged:
        name, corruption, _ = key.split("/")
        parts[corruption in NOISE].append(max(value for other, value in alone.items() if other != name))
    cells = [f"{mean(parts[True]):.1f}", f"{mean(parts[False]):.1f}", f"{100 * min(parts[False]):.1f}"]
    seeds = len(content["alone"][best])
    return [
        (f"best single: {best}", seeds, [f"{100 * alone[best]:.1f}", "", "", "", ""]),
        ("best intact", seeds, ["", *cells, "100.0"]),
    ]


def samples(runs: list[dict[str, Any]], which: int) -> np.ndarray:
    return np.mean([run["samples"]["unseen"][which] for run in runs], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().results]
    lines, tests = [], []
    for content in tables:
        title = content["set"] + ("" if content["fold"] == "all" else f" {content['fold']}")
        control = content["runs"][CONTROL]
        for name, count, cells in alone_rows(content):
            lines.append((title, name, count, cells, None, [], 0, None))
        for method, by_seed in sorted(content["runs"].items(), key=lambda item: (*METHODS, item[0]).index(item[0])):
            seeds = sorted(set(by_seed) & set(control))
            runs, others = [by_seed[seed] for seed in seeds], [control[seed] for seed in seeds]
            reference = row(content, others, 0)
            for which, suffix in ((0, ""), (1, "+reliability")):
                values = row(content, runs, which)
                same = method == CONTROL and which == 0
                group = None
                if not same:
                    change = samples(runs, which) - samples(others, 0)
                    tests.append(bootstrap_p(change))
                    groups = runs[0].get("groups")
                    group = grouped_p(change, np.array(groups)) if len(set(groups or ())) > 2 else None
                better = sum(
                    float(np.mean(run["samples"]["unseen"][which])) > float(np.mean(other["samples"]["unseen"][0]))
                    for run, other in zip(runs, others, strict=True)
                )
                index = None if same else len(tests) - 1
                lines.append((title, method + suffix, len(seeds), values, index, reference, better, group))
    corrected = holm(tests)
    print(
        "| set | method | seeds | clean | noise | unseen | worst unseen | near | unseen, difference | p, groups | aim |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for title, method, seeds, values, test, reference, better, group in lines:
        cells = [value if isinstance(value, str) else f"{value:.1f}" for value in values]
        difference = aim = ""
        if test is not None:
            clean, unseen = values[0] - reference[0], values[2] - reference[2]
            p = "< 0.001" if corrected[test] < 0.001 else f"= {corrected[test]:.3f}"
            difference = f"{unseen:+.1f} (p {p}, higher on {better} of {seeds})"
            fails = [
                text
                for text, fine in (
                    (f"clean {clean:+.1f}", clean >= -0.5),
                    (f"unseen {unseen:+.1f}", unseen >= 4 and corrected[test] < 0.05),
                    (f"near {values[4]:.0f} %", values[4] >= 80),
                )
                if not fine
            ]
            aim = ", ".join(fails) or "met"
        test_of_groups = "" if group is None else f"{group:.3f}"
        line = f"| {title} | {method} | {seeds} | {' | '.join(cells)} | {difference} | {test_of_groups} | {aim} |"
        print(line.replace(" -", " −"))


if __name__ == "__main__":
    main()
