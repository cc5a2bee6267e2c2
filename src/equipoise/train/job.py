"""What a run is: a recipe, a method, a seed and a fold; and where it lives."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..recipes import Recipe
from ..record import Run, plain


@dataclass(frozen=True)
class Job:
    """What is run: everything that decides the result."""

    recipe: Recipe
    method: str
    seed: int
    fold: str | None = None

    def folder(self, out: Path) -> Path:
        """Where the run lives in the folder of its comparison."""
        return out / "runs" / (self.fold or "all") / self.method / f"seed{self.seed}"

    def fingerprint(self) -> str:
        """What must be unchanged for a finished or stopped run to count."""
        content = asdict(self.recipe)
        # What compare runs, and where the data lie, does not change what a run computes.
        for name in ("methods", "seeds", "folds", "reference", "references"):
            content.pop(name)
        content["data"].pop("root", None)
        if not content["model"]:
            # Runs of before there were other models count as well.
            for name in ("model", "variants"):
                content.pop(name)
        # Nor do variants that this method does not use.
        base, *balancers = (part.strip() for part in self.method.split("+"))
        if "variants" in content:
            content["variants"] = {k: v for k, v in content["variants"].items() if k == base}
        content["fusions"] = {k: v for k, v in content["fusions"].items() if k == base}
        content["balancers"] = {k: v for k, v in content["balancers"].items() if k in balancers}
        job = {"recipe": content, "method": self.method, "seed": self.seed, "fold": self.fold}
        return json.dumps(plain(job), sort_keys=True)


def finished(job: Job, folder: Path) -> Run | None:
    """The run that ``perform`` wrote into this folder, if it is whole and of the same recipe."""
    try:
        stored = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(stored, dict) and stored.get("fingerprint") == job.fingerprint()
    return stored["run"] if same else None
