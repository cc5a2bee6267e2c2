"""Command ``train``: one method with one seed."""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..io.atomic_files import check_folder, check_path_component
from ..results import result_rows
from .command_line import Parser, described, path, whole, with_recipe_options
from .data_options import add_data_options, chosen_recipe
from .diagnose_command import diagnose, diagnose_parser
from .report_command import write_report

if TYPE_CHECKING:
    from ..training.run_spec import RunSpec


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
    return with_recipe_options(parser)


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
        write_report(content, folder / "results.json", folder / "report.html")
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
