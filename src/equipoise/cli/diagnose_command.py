"""``equipoise diagnose``: runs the diagnostics on trained runs; writes ``diagnosis.json`` and a page."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ConfigError, EquipoiseError
from ..io.atomic_files import check_folder, check_path_component
from ..results import result_rows
from ..results.significance import unpack_outcomes
from ..results.task_metrics import select_metrics
from ..training import recipes
from ..training.recipes import Recipe
from .command_line import Parser, described, path, whole
from .data_options import allow_named_code

if TYPE_CHECKING:
    from rich.console import Console

    from ..data import Dataset
    from ..diagnostics.suite import Diagnosis

EXAMPLES = (
    "equipoise diagnose runs/digits-joint+rollingq",
    "equipoise diagnose runs/demo/runs/all/joint/seed0 runs/demo/runs/all/joint+rollingq/seed0 --out runs/two",
    "equipoise diagnose runs/mine --tests noise,masking,response --outside noise",
)
BATCH = 256


@dataclass(frozen=True)
class Alone:
    """Score of a unimodal model, and the data it was measured on.

    Attributes:
        score: score on the test split.
        each: (sample,) outcome of every test sample; None if the run did not store it.
        data: data options of the recipe, without the location of the data; None if unavailable.
    """

    score: float
    each: np.ndarray | None
    data: dict[str, Any] | None

    def on(self, data: dict[str, Any], samples: int) -> float | torch.Tensor:
        """Returns the outcomes if they belong to the same samples, otherwise the score."""
        if self.each is None or self.data != data or len(self.each) != samples:
            return self.score
        return torch.from_numpy(self.each)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, loaded from its folder."""

    folder: Path
    recipe: Recipe
    run: dict[str, Any]

    @property
    def title(self) -> str:
        return str(self.run["method"])


def diagnose_parser() -> Parser:
    parser = described(
        "Tests whether trained models use their modalities; prints verdicts and writes a page.", *EXAMPLES
    )
    parser.add_argument("runs", type=path, nargs="+", help="folders of finished runs of train or compare")
    parser.add_argument(
        "--out",
        type=path,
        default=None,
        help="output folder; RUN/diagnosis by default, runs/diagnosis for several runs",
    )
    parser.add_argument(
        "--data",
        default=None,
        metavar="TABLE",
        help="location of the data, if it was moved since training; FILE.py:FUNCTION for data made by your own code",
    )
    parser.add_argument("--tests", default=None, help="comma-separated test names; all by default")
    parser.add_argument("--seed", type=whole, default=0, help="seed of the noise")
    parser.add_argument(
        "--outside", choices=("noise", "none"), default="noise",
        help="out-of-distribution inputs for the confidence test: noise replaces every modality by noise",
    )  # fmt: skip
    parser.add_argument(
        "--modality",
        default=None,
        help="modality to replace by noise in the attention test; by default that of the run",
    )
    parser.add_argument(
        "--metric", default=None,
        help="metric of all tests and verdicts, such as f1_macro; by default the first under metrics in the recipe of "
        "the run, or the score of the task",
    )  # fmt: skip
    return parser


def diagnose(options: Namespace) -> int:
    """Diagnoses every run on its test split, writes the results, and prints the verdicts."""
    from ..diagnostics.suite import TESTS, results
    from ..report import diagnosis_html  # noqa: F401  (a missing package is reported before the tests run)
    from .console import out
    from .progress_bars import DiagnosisProgress

    tests = None if options.tests is None else [name.strip() for name in options.tests.split(",") if name.strip()]
    if tests == []:
        raise ConfigError("diagnose", expected=f"some of {', '.join(TESTS)} after --tests", got=repr(options.tests))
    alone = len(options.runs) == 1
    folder = options.out or (options.runs[0] / "diagnosis" if alone else Path("runs") / "diagnosis")
    check_folder(folder, "diagnose")
    # Load all folders first, so that a wrong name is reported before any test runs.
    trained = [read(folder) for folder in options.runs]
    names = _named(trained)
    if options.metric is not None:
        select_metrics([options.metric], None, "diagnose --metric")
    scores = _alone(trained, options.metric)
    diagnoses = []
    with DiagnosisProgress(len(trained), out) as progress:
        for one, name in zip(trained, names, strict=True):
            progress.begin(name)
            diagnoses.append(diagnose_run(one, name, tests, options, scores, progress))
    for name, diagnosis in zip(names, diagnoses, strict=True):
        diagnosis.save(folder if alone else folder / check_path_component(name.replace("/", "-"), "diagnose"))
    if len(diagnoses) > 1:
        result_rows.write_results(folder / "results.json", results(diagnoses))
    page = diagnoses[0].report(folder / "report.html", *diagnoses[1:])
    show(diagnoses, out)
    out.print(f"diagnosis: {folder}", soft_wrap=True, highlight=False)
    out.print(f"report:    {page}", soft_wrap=True, highlight=False)
    return 0


def read(folder: Path) -> TrainedRun:
    """Loads the run in a folder.

    Raises:
        DataError: not the folder of a finished run, or damaged.
    """
    from ..training.run_loading import finished_run

    run, recipe = finished_run(folder), recipes.load_recipe(folder / "recipe.yaml")
    if recipe.model:
        raise ConfigError(
            "diagnose", expected="a run of a fusion, whose attention is shared between modalities",
            got=f"'{folder}', a run of the model '{recipe.model['name']}'",
            fix="Its metrics are in results.json and run.json; equipoise report shows them.",
        )  # fmt: skip
    return TrainedRun(folder, recipe, run)


def diagnose_run(
    trained: TrainedRun, name: str, tests: Sequence[str] | None, options: Namespace, alone: dict[tuple, Alone],
    progress: Any,
) -> Diagnosis:  # fmt: skip
    """Diagnoses one run on its test split, with noise statistics of its training data."""
    from .. import data
    from ..diagnostics.suite import diagnose as ask
    from ..training.run import load_run_dataset
    from ..training.run_loading import load, with_data

    run = trained.run
    location = allow_named_code(options.data)
    source = load_run_dataset(with_data(trained.recipe, location), run["fold"])
    model = load(trained.folder, data=source)
    loader = data.loader(source, "test", BATCH, seed=0, train=False, rank=0, world=1)
    used, samples = _data(trained.recipe), len(source.test)
    arguments = {
        one: alone[key].on(used, samples) for one in model.names if (key := (one, run["fold"], run["seed"])) in alone
    }
    diagnosis = ask(
        model, loader, tests=tests, name=name, seed=options.seed,
        noise={one: source.noise[one] for one in model.names},
        modality=_modality(options, trained, model.names), metric=_metric(options.metric, trained.recipe),
        outside=_Noise(source, model.names, options.seed) if options.outside == "noise" else None,
        # Unimodal scores are used only if all modalities have one.
        alone=arguments if len(arguments) == len(model.names) else None, progress=progress,
    )  # fmt: skip
    protocol = {"data": trained.recipe.data_title, "split": "test", "method": run["method"]}
    outside = {"outside": options.outside} if options.outside != "none" else {}
    return replace(
        diagnosis, seed=run["seed"], fold=run["fold"], protocol={**protocol, **outside, **diagnosis.protocol}
    )


def _metric(name: str | None, recipe: Recipe) -> str | None:
    """Returns the metric given as an option, or else the main metric of the recipe; None for the score of the task."""
    return name or next(iter(recipe.metrics), None)


def _modality(options: Namespace, trained: TrainedRun, names: tuple[str, ...]) -> str | None:
    """Returns the modality given as an option, or else the noise modality of the run."""
    modality = options.modality or trained.run.get("noise_modality") or trained.recipe.noise_modality
    # A unimodal run may not have that modality.
    return modality if options.modality or modality in names else None


@dataclass(frozen=True)
class _Noise:
    """Batches of noise in the shapes of the test split, with its masks and times."""

    source: Dataset
    names: tuple[str, ...]
    seed: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from .. import data

        # Use another seed than the noise that replaces one modality.
        generator = torch.Generator().manual_seed(self.seed + 7_919)
        for batch in data.loader(self.source, "test", BATCH, seed=0, train=False, rank=0, world=1):
            noise: dict[str, Any] = {name: self._draw(name, batch[name], generator) for name in self.names}
            yield noise | {key: batch[key] for key in ("mask", "times") if key in batch}

    def _draw(self, name: str, values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if name in self.source.vocabulary:
            return torch.randint(1, self.source.vocabulary[name], values.shape, generator=generator)
        mean, std = self.source.noise[name]
        return torch.randn(values.shape, generator=generator) * std + mean


def _named(trained: Sequence[TrainedRun]) -> list[str]:
    """Returns unique names of the runs: the method, with fold and seed where needed."""
    titles = [one.title for one in trained]
    names = []
    for one in trained:
        more = "" if one.run["fold"] is None else f", fold {one.run['fold']}"
        names.append(one.title if titles.count(one.title) == 1 else f"{one.title}{more}, seed {one.run['seed']}")
    if len(set(names)) < len(names):
        raise ConfigError("diagnose", expected="each run once", got=", ".join(names))
    return names


def _alone(trained: Sequence[TrainedRun], name: str | None) -> dict[tuple, Alone]:
    """Returns {(modality, fold, seed): unimodal score}, from the given runs and their comparison."""
    from ..diagnostics.task_scores import SCORES

    scores: dict[tuple, Alone] = {}
    for one in trained:
        siblings = [one.folder.parent.parent / name / one.folder.name / "run.json" for name in one.recipe.encoders]
        stored = [(run, _data_of(path.parent)) for path in siblings if (run := _stored(path)) is not None]
        for run, data in [(one.run, _data(one.recipe)), *stored]:
            metrics, each = run["metrics"], run.get("outcomes") or {}
            metric_name = _metric(name, one.recipe)
            candidates = SCORES.values() if metric_name is None else (metric_name,)
            metric = next((name for name in candidates if metrics.get(name) is not None), None)
            if run["method"] in one.recipe.encoders and metric is not None:
                outcomes = unpack_outcomes(each[metric]) if metric in each else None
                scores[run["method"], run["fold"], run["seed"]] = Alone(float(metrics[metric]), outcomes, data)
    return scores


def _data(recipe: Recipe) -> dict[str, Any]:
    """Returns the options of the data set without its location."""
    return {name: value for name, value in recipe.data.items() if name not in ("root", "path")}


def _data_of(folder: Path) -> dict[str, Any] | None:
    try:
        return _data(recipes.load_recipe(folder / "recipe.yaml"))
    except EquipoiseError:
        return None


def _stored(path: Path) -> dict[str, Any] | None:
    from ..training.run_folder import read_run

    try:
        return read_run(path.parent)["run"]
    except EquipoiseError:
        return None


STYLES = {"good": ("✓", "green"), "bad": ("✗", "red"), "neutral": ("○", "dim")}


def show(diagnoses: Sequence[Diagnosis], console: Console) -> None:
    """Prints the verdicts, each with its test."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ..report.verdict_list import headline

    for diagnosis in diagnoses:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        title = headline(diagnosis.name, list(diagnosis.verdicts))
        table.add_column("")
        table.add_column(f"{title} ({diagnosis.samples} samples)", overflow="fold")
        table.add_column("test", no_wrap=True)
        for verdict in diagnosis.verdicts:
            mark, style = STYLES[verdict.ok]
            table.add_row(Text(mark, style=style), Text(verdict.text), Text(verdict.test, style="dim"))
        console.print(table)
        if diagnosis.skipped:
            reasons = "; ".join(f"{test}: {reason}" for test, reason in diagnosis.skipped.items())
            console.print(f"Not tested: {reasons}", style="dim", highlight=False, markup=False)
        console.print()
