"""Training with the whole catalog of corruptions but one family, tested on that family, against training with noise.

    python benchmarks/reliability_left_out.py --sets utd_mhad --seeds 3 --out left_out
    python benchmarks/reliability_left_out.py --sets av_digits --folds A --seeds 1 --out left_out

For each family of corruptions (see ``reliability.py``), ``concat_aux`` and ``ensemble`` are trained with
``ModalityCorruption(corruptions=...)`` of all other families and tested under the damage of this family, with and
without Reliability that is calibrated with the same corruptions: neither training nor calibration contains the damage.
The lines ``concat_aux+catalog`` and ``ensemble+catalog`` of the table join these models: damage is predicted by the
model that has not seen it, "clean" is the mean over the models. The control, ``concat_aux+corruption``, is trained with
noise. All options are those of the recipes. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reliability_suite import call
from reliability_table import CONTROL

from equipoise.diagnostics import corruptions
from equipoise.training import comparison, recipes
from reliability import FAMILIES, FAMILY, measure

BASES = ("concat_aux", "ensemble")


def join(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Joins the measurements of the models of one seed, one for each family, to those of one method."""
    models = list(parts.values())
    joined: dict[str, Any] = {
        "clean": np.mean([one["clean"] for one in models], axis=0).tolist(),
        "agreement": float(np.mean([one["agreement"] for one in models])),
        "damaged": {key: value for one in models for key, value in one["damaged"].items()},
        "groups": models[0]["groups"],
        "samples": {},
    }
    for key in ("seen", "unseen"):
        counts = [one["counts"][key] for one in models]
        values = np.array([one["samples"][key] for one in models])
        joined["samples"][key] = np.average(values, axis=0, weights=counts).round(4).tolist()
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["utd_mhad"])
    parser.add_argument("--folds", type=lambda text: text.split(","), help="by default those of the recipe")
    parser.add_argument("--bases", type=lambda text: text.split(","), default=BASES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--severities", type=int, nargs="+", default=[4])
    parser.add_argument("--most-val", type=int, default=400)
    parser.add_argument("--most-test", type=int, default=600)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    given = argparse.Namespace(
        **vars(options), data=None, distance="knn", form="marginal", prototypes=100_000, corruptions=None, cost=False
    )
    files = []
    for name in options.sets:
        recipe = recipes.load_recipe(name)
        others = {f: [c for c in corruptions.corruption_names() if FAMILY.get(c) != f] for f in FAMILIES}
        balancers = {f"without_{f}": {"balancer": "corruption", "corruptions": names} for f, names in others.items()}
        recipe = replace(recipe, balancers={**recipe.balancers, **balancers}, references={}, reference=None)
        methods = [f"{base}+without_{family}" for base in options.bases for family in FAMILIES]
        folds = options.folds or recipe.folds
        comparison.compare(
            recipe, [*recipe.encoders, CONTROL, *methods], seeds=options.seeds, folds=folds, out=options.out / name,
            title=name, workers=0,
        )  # fmt: skip
        for fold in folds or ["all"]:
            file = options.out / (f"{name}.json" if fold == "all" else f"{name}_{fold}.json")
            call(
                "reliability.py", str(options.out / name), "--fold", fold, "--seeds", str(options.seeds), "--methods",
                CONTROL, "--severities", *map(str, options.severities), "--most-val", str(options.most_val),
                "--most-test", str(options.most_test), "--out", str(file),
            )  # fmt: skip
            kept = json.loads(file.read_text(encoding="utf-8"))
            for base in options.bases:
                for seed in range(options.seeds):
                    found = kept["runs"].setdefault(f"{base}+catalog", {})
                    if str(seed) in found:
                        continue
                    parts = {}
                    for family in FAMILIES:
                        run = options.out / name / "runs" / fold / f"{base}+without_{family}" / f"seed{seed}"
                        with torch.no_grad():
                            parts[family] = measure(run, given, family)
                    found[str(seed)] = join(parts)
                    file.write_text(json.dumps(kept), encoding="utf-8")
                    print(f"{name}, fold {fold}, {base}+catalog, seed {seed} done", flush=True)
            files.append(str(file))
    call("reliability_table.py", *files)


if __name__ == "__main__":
    main()
