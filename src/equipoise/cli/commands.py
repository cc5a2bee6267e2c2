"""The commands of the program."""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.corruptions import check_corruptions
from ..errors import ConfigError
from ..io.atomic_files import atomic_write, check_file, check_folder, check_path_component
from ..results import result_rows
from ..training import recipes
from ..training.recipes import Recipe
from ..training.recipes.recipe_changes import parse_value
from . import recipe_overrides
from .bench_command import bench, bench_parser
from .command_line import Command, Parser, described, fail, path, whole
from .compare_search import add_search_options, search_options
from .data_command import data_parser, manage_data
from .data_options import add_data_options, chosen_recipe
from .diagnose_command import diagnose, diagnose_parser
from .evaluate_command import evaluate, evaluate_parser
from .look_command import look, look_parser
from .search_command import search, search_parser

if TYPE_CHECKING:
    from ..training.run_spec import RunSpec


DEMO_SEEDS = 4
"""One fewer than the recipe has, so that the demo takes less than five minutes on two cores."""
DEMO_TESTS = "score,noise,masking,response,attention,shapley"


def demo_parser() -> Parser:
    parser = described(
        "Trains seven methods on the bundled digits; writes a table, results.json and report.html. Then diagnoses "
        "joint attention on the digits, and on generated data where it has no negative finding.",
        "equipoise demo",
        "equipoise demo --quick                one seed, under three minutes",
        "equipoise demo --out runs/mine        run again with the same folder to resume",
    )
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="output folder of runs, results and report")
    parser.add_argument("--quick", action="store_true", help="one seed instead of four")
    _add_workers(parser)
    return parser


def demo(options: Namespace) -> int:
    recipe = recipes.load_recipe("digits")
    failed = _compare(recipe, recipe.methods, 1 if options.quick else DEMO_SEEDS, [], options, title="digits")
    return failed or _healthy_demo(options)


def _healthy_demo(options: Namespace) -> int:
    """Trains joint attention on data where it is healthy, and diagnoses it there and on the digits."""
    from ..training.comparison import compare
    from .console import out
    from .progress_bars import ComparisonProgress

    recipe, folder = recipes.load_recipe("generated_failures"), options.out / "generated_failures"
    with ComparisonProgress(out) as progress:
        # In this process: the runs are short, and worker processes would have to start again.
        compare(
            recipe, recipe.methods, seeds=1, out=folder, title="generated_failures", workers=0, listener=progress,
            begin=progress.begin,
        )  # fmt: skip
    for title, runs in (("digits", options.out), ("generated_failures", folder)):
        out.print(f"\n[bold]{title}[/bold]: diagnosis of joint attention, seed 0")
        run = runs / "runs" / "all" / "joint" / "seed0"
        diagnose(diagnose_parser().parse_args([str(run), "--tests", DEMO_TESTS]))
    return 0


def compare_parser() -> Parser:
    parser = described(
        "Runs methods x seeds x folds in parallel; finished runs are not repeated.",
        "equipoise compare --config digits --methods concat,joint,joint+rollingq --seeds 5",
        "equipoise compare --config av_digits --folds A,B,C --out runs/folds",
        "equipoise compare --config mine.yaml --train.epochs 3 --data.audio_noise 1.5",
        "equipoise compare --data people.csv --target label --group speaker --methods concat,joint --seeds 5",
        "equipoise compare --config cremad --executor slurm --slurm timeout_min=240 --slurm slurm_partition=gpu",
        "equipoise compare --config digits --methods joint --search train.learning_rate=1e-4..1e-2:log --trials 30",
    )
    add_data_options(parser)
    parser.add_argument("--methods", default=None, help="comma-separated; by default those of the recipe")
    parser.add_argument("--seeds", type=whole, default=None, help="number of seeds, starting at 0")
    parser.add_argument("--folds", default=None, help="comma-separated, for data sets with folds")
    parser.add_argument("--out", type=path, default=None, help="output folder; runs/<recipe> by default")
    parser.add_argument(
        "--leave-one-kind-out",
        metavar="KIND",
        default=None,
        help="a corruption of the catalog, such as blur, or several separated by commas: training with corruption and "
        "+reliability use the others, and the test measures the score under it",
    )
    _add_workers(parser)
    parser.add_argument(
        "--accelerator", default="cpu",
        help="accelerator of Lightning; cpu by default, so that results do not depend on the machine; with gpu each "
        "run uses one device, and runs are distributed over the available ones",
    )  # fmt: skip
    parser.add_argument(
        "--executor", choices=("local", "slurm"), default="local",
        help="local: processes of this machine; slurm: one job per run (needs submitit). Jobs resume after a "
        "preemption; repeat the command to wait for jobs that are still queued or running",
    )  # fmt: skip
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="OPTION=VALUE",
        help="option of submitit's AutoExecutor, such as timeout_min=240, mem_gb=16, slurm_partition=gpu; repeatable",
    )  # fmt: skip
    add_search_options(parser)
    return _with_recipe(parser)


def compare(options: Namespace) -> int:
    recipe, title = chosen_recipe(options)
    if options.leave_one_kind_out is not None:
        left_out = _split(options.leave_one_kind_out, "--leave-one-kind-out")
        check_corruptions(left_out, "--leave-one-kind-out")
        recipe = replace(recipe, left_out=left_out)
        title = "-".join([title, "without", *left_out])
    options.out = options.out or Path("runs") / check_path_component(title, "--config")
    names = recipe.methods if options.methods is None else _split(options.methods, "--methods")
    folds = recipe.folds if options.folds is None else _split(options.folds, "--folds")
    seeds = recipe.seeds if options.seeds is None else options.seeds
    if options.search:
        folds = recipe.folds[:1] if options.folds is None else folds
        return _search(recipe, names, folds, options, title=title)
    if options.trials is not None:
        raise ConfigError("compare", expected="--trials only with --search", got=f"--trials {options.trials}")
    return _compare(
        recipe, names, seeds, folds, options, title=title, accelerator=options.accelerator, executor=options.executor,
        slurm_options=_slurm_options(options.slurm),
    )  # fmt: skip


def _slurm_options(texts: Sequence[str]) -> dict[str, Any]:
    options = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ConfigError("--slurm", expected="OPTION=VALUE", got=f"'{text}'")
        options[name] = parse_value(value, f"--slurm {name}")
    return options


def train_parser() -> Parser:
    parser = described(
        "Trains one method with one seed; writes weights, checkpoints and metrics to one folder.",
        "equipoise train --config digits --method joint+rollingq",
        "equipoise train --config digits --method joint+rollingq --resume        after an interruption",
        "equipoise train --config digits --method joint --accelerator gpu --devices 4 --strategy ddp",
        "equipoise train --data people.csv --target label --group speaker        your own table",
        "equipoise train --data my_data.py:make        data sets that your own function returns",
    )
    add_data_options(parser)
    parser.add_argument("--method", default=None, help="by default the last one of the recipe")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--fold", default=None, help="fold of the data set; by default the first one of the recipe")
    parser.add_argument("--out", type=path, default=None, help="output folder; runs/<recipe>-<method> by default")
    parser.add_argument("--resume", action="store_true", help="resume after the last complete epoch")
    parser.add_argument("--accelerator", default="auto", help="accelerator of Lightning: auto, cpu, gpu")
    parser.add_argument("--devices", default="auto", help="number of devices, or auto")
    parser.add_argument("--strategy", default="auto", help="strategy of Lightning: auto, ddp")
    parser.add_argument("--num_nodes", type=whole, default=1)
    parser.add_argument(
        "--diagnose", action=BooleanOptionalAction, default=None,
        help="run equipoise diagnose on the trained model; by default with --data",
    )  # fmt: skip
    return _with_recipe(parser)


def train(options: Namespace) -> int:
    from ..training import method_factory
    from ..training.run import execute_run
    from ..training.run_spec import RunSpec
    from ..training.variant_factory import evaluation_metric, named_metrics
    from .console import out
    from .progress_bars import TrainingProgress
    from .results_table import show

    recipe, title = chosen_recipe(options)
    method = options.method or recipe.methods[-1]
    fold = options.fold or (recipe.folds[0] if recipe.folds else None)
    folder = options.out or Path("runs") / check_path_component(f"{title}-{method}", "train")
    job = RunSpec(recipe, method_factory.parse_method(method, recipe).name, options.seed, fold)
    check_folder(folder, "train")
    _fresh(job, folder, options.resume)
    settings = {
        "accelerator": options.accelerator,
        "devices": int(options.devices) if options.devices.isdecimal() else options.devices,
        "strategy": options.strategy,
        "num_nodes": options.num_nodes,
        "callbacks": [TrainingProgress(out)],
    }
    run = execute_run(job, folder, trainer_options=settings)
    if run is not None:
        protocol = {"recipe": title, "methods": [method], "seeds": [options.seed], "folds": [fold] if fold else []}
        protocol |= evaluation_metric(recipe) | named_metrics(recipe)
        content = result_rows.build_results([run], protocol)
        result_rows.write_results(folder / "results.json", content)
        content.write_csv(folder / "results.csv")
        show(content, out)
        out.print(f"weights: {folder / 'model.safetensors'}", soft_wrap=True, highlight=False)
        out.print(f"recipe:  {folder / 'recipe.yaml'}", soft_wrap=True, highlight=False)
        _draw(content, folder / "results.json", folder / "report.html")
        if (options.data is not None if options.diagnose is None else options.diagnose) and not recipe.model:
            return diagnose(diagnose_parser().parse_args([str(folder)]))
    return 0


def _fresh(job: RunSpec, folder: Path, resume: bool) -> None:
    """Raises ConfigError if the training would overwrite another one."""
    from ..training.run import is_resumable
    from ..training.run_spec import is_finished

    if not (folder / "checkpoints").exists():
        return
    if not resume:
        raise ConfigError(
            "train", expected="a new folder, or --resume", got=f"'{folder}', which contains a run already",
            fix="Add --resume to continue it, or choose another --out.",
        )  # fmt: skip
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if checkpoint.exists() and is_resumable(folder, job) is None and is_finished(job, folder) is None:
        raise ConfigError(
            "train --resume",
            expected="the recipe, method, seed and fold of the interrupted run",
            got=f"settings that differ from those in '{folder}'",
            fix="Use recipe.yaml in that folder, or choose another --out.",
        )


def report_parser() -> Parser:
    parser = described(
        "Writes results.json as a self-contained HTML page.",
        "equipoise report runs/demo",
        "equipoise report runs/demo/results.json --out page.html",
    )
    parser.add_argument("results", type=path, help="results.json, or its folder")
    parser.add_argument(
        "--out", type=path, default=None, help="output file; by default report.html next to the results"
    )
    return parser


def report(options: Namespace) -> int:
    from ..training.run_spec import check_against

    results = options.results / "results.json" if options.results.is_dir() else options.results
    page = options.out or results.with_name("report.html")
    if not page.is_dir() or page.is_symlink():
        check_file(page, "report")
    content = result_rows.load_results(options.results)
    check_against(results.parent, content["runs"])
    _draw(content, results, page)
    return 0


def recipes_parser() -> Parser:
    parser = described(
        "Lists the packaged recipes, or copies one to edit.",
        "equipoise recipes ls",
        "equipoise recipes cp digits mine.yaml",
    )
    parser.add_argument("action", choices=("ls", "cp"), help="ls lists, cp copies")
    parser.add_argument("name", nargs="?", default=None, help="cp: name of the recipe")
    parser.add_argument("to", type=path, nargs="?", default=None, help="cp: file or folder; ./<name>.yaml by default")
    return parser


def manage_recipes(options: Namespace) -> int:
    from .console import out

    if options.action == "ls":
        for name in recipes.recipe_names():
            manual = recipes.recipe_header(recipes.find_recipe(name)).splitlines()
            out.print(f"[bold]{name}[/bold]  {manual[0].partition(':')[2].strip()}", highlight=False, soft_wrap=True)
        return 0
    if options.name is None:
        names = ", ".join(recipes.recipe_names())
        raise ConfigError("recipes cp", expected="a recipe's name", got="none", fix=f"One of: {names}.")
    source = recipes.find_recipe(options.name)
    target = options.to or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise ConfigError(
            "recipes cp", expected="a file that does not exist yet", got=f"'{target}'", fix="Choose another name."
        )
    if not target.parent.is_dir():
        raise ConfigError("recipes cp", expected="an existing folder", got=f"'{target.parent}'", fix="Create it first.")
    check_file(target, "recipes cp")
    atomic_write(target, source.read_bytes())
    out.print(f"Copied to {target}. Run it with --config {target}", soft_wrap=True, highlight=False)
    return 0


COMMANDS = {
    "demo": Command("bundled data, a few minutes -> table and report.html", demo_parser, demo),
    "compare": Command("methods x seeds x folds, with paired statistics", compare_parser, compare),
    "train": Command("one method, with checkpoints and --resume", train_parser, train),
    "bench": Command("what a run would cost: parameters, FLOPs, memory, time", bench_parser, bench),
    "diagnose": Command("trained runs -> verdicts, diagnosis.json and report.html", diagnose_parser, diagnose),
    "look": Command("a Hugging Face model and an image -> attention, look.json, report.html", look_parser, look),
    "evaluate": Command(
        "a pretrained model on emoji, scenes or your questions -> retrieval, answers, use of the image",
        evaluate_parser,
        evaluate,
    ),
    "search": Command("text -> images or image -> texts, in a trained dual encoder", search_parser, search),
    "report": Command("results.json -> one self-contained HTML page", report_parser, report),
    "data": Command("list, prepare and verify published data sets", data_parser, manage_data),
    "recipes": Command("list or copy the packaged recipes", recipes_parser, manage_recipes),
}


def _add_workers(parser: Parser) -> None:
    parser.add_argument(
        "--workers", type=whole, default=None, help="number of parallel runs; by default the number of cores"
    )


def _with_recipe(parser: Parser) -> Parser:
    """Makes the parser accept the options of a recipe as well."""
    parser.reads_recipe = True
    parser.epilog = f"{recipe_overrides.HELP}\n\n{parser.epilog}"
    return parser


def _split(names: str, option: str) -> list[str]:
    parts = [name.strip() for name in names.split(",") if name.strip()]
    if not parts:
        # An empty list would silently run the defaults.
        raise ConfigError("compare", expected=f"names after {option}, separated by commas", got=f"'{names}'")
    return parts


def _compare(
    recipe: Recipe, names: Sequence[str], seeds: int, folds: Sequence[str], options: Namespace, *, title: str,
    accelerator: str = "cpu", executor: str = "local", slurm_options: dict[str, Any] | None = None,
) -> int:  # fmt: skip
    # The report is imported before training, so that a missing package is reported at once.
    from ..report import comparison_figures, comparison_page  # noqa: F401
    from ..training.comparison import compare
    from .console import out
    from .progress_bars import ComparisonProgress
    from .results_table import show

    with ComparisonProgress(out) as progress:
        content = compare(
            recipe, names, seeds=seeds, folds=folds, out=options.out, title=title, workers=options.workers,
            listener=progress, begin=progress.begin, accelerator=accelerator, executor=executor,
            slurm_options=slurm_options,
        )  # fmt: skip
    show(content, out)
    results = options.out / "results.json"
    _draw(content, results, options.out / "report.html")
    for failure in content["failures"]:
        # Errors of other libraries include a traceback; results.json keeps it.
        error = str(failure["error"]).strip().splitlines()[-1]
        fail(f"{failure['method']}, seed {failure['seed']} failed. {error}")
    return 1 if content["failures"] else 0


def _search(recipe: Recipe, names: Sequence[str], folds: Sequence[str], options: Namespace, *, title: str) -> int:
    # The report is imported before training, so that a missing package is reported at once.
    from ..report import comparison_figures, comparison_page  # noqa: F401
    from .console import out
    from .results_table import show

    content = search_options(recipe, names, folds, options, title=title)
    show(content, out)
    _draw(content, options.out / "results.json", options.out / "report.html")
    return 0


def _draw(content: dict[str, Any], results: Path, path: Path) -> None:
    """Writes report.html, and summary.png if the report is written next to results.json."""
    from ..report import ResultsView
    from ..report import report as draw
    from ..report.comparison_figures import summary_png
    from ..report.damage_figure import damage_png
    from .console import out

    page = draw(content, path)
    is_next_to_results = page.parent.resolve() == results.parent.resolve()
    view = ResultsView(content)
    image = (damage_png(view) or summary_png(view)) if is_next_to_results else None
    if image is not None:
        atomic_write(results.with_name("summary.png"), image)
    out.print(f"results: {results}", soft_wrap=True, highlight=False)
    out.print(f"report:  {page}", soft_wrap=True, highlight=False)
