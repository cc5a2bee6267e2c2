"""``equipoise evaluate``: evaluates a pretrained model on our benchmarks; prints a table and writes ``results.json``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.atomic_files import check_folder, check_path_component
from ..results import result_rows
from .command_line import Parser, described, path, whole

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = (
    "equipoise evaluate openai/clip-vit-base-patch32                    two-tower model: emoji retrieval",
    'equipoise evaluate google/siglip-base-patch16-224 --template "an emoji of {}"',
    "equipoise evaluate llava-hf/llava-1.5-7b-hf --samples 200          generative model: scenes",
    "equipoise evaluate Salesforce/blip2-itm-vit-g --data emoji",
)


def evaluate_parser() -> Parser:
    parser = described(
        "Evaluates a Hugging Face model on the benchmarks of this library: retrieval of emoji by name, or questions "
        "about scenes, also with a shuffled and with a blank image.", *EXAMPLES,
    )  # fmt: skip
    parser.add_argument("model", help="model id on the Hugging Face Hub, or a folder written by save_pretrained")
    parser.add_argument(
        "--data", choices=("emoji", "scenes"), default=None, help="benchmark; by default the one that fits the model"
    )
    parser.add_argument("--level", type=whole, default=2, help="difficulty of scenes: 1, 2 or 3")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--samples", type=whole, default=200, help="number of scenes; each is evaluated three times")
    parser.add_argument("--template", default="{}", help='caption template, such as "an emoji of {}"')
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; an accelerator if available by default")
    parser.add_argument("--dtype", default=None, help="data type of a generative model; auto by default")
    parser.add_argument("--out", type=path, default=None, help="output folder; runs/evaluate-<name> by default")
    return parser


def evaluate(options: Namespace) -> int:
    from .. import data
    from ..evaluation import evaluate as evaluate_model
    from ..evaluation.model_loading import load_for_benchmark, matching_benchmark
    from .console import out
    from .progress_bars import progress_iterator

    model = Path(options.model)
    name = model.resolve().name if model.name in ("", "..") else model.name
    folder = options.out or Path("runs") / check_path_component(f"evaluate-{name}", "evaluate")
    check_folder(folder, "evaluate")
    benchmark = options.data or matching_benchmark(options.model)
    source = data.load_dataset(benchmark, **({"level": options.level} if benchmark == "scenes" else {}))
    with out.status("loading the model"):
        loaded = load_for_benchmark(benchmark, options.model, dtype=options.dtype, device=options.device)
    with progress_iterator("evaluating", out) as step:
        metrics = evaluate_model(
            *loaded, source, split=options.split, samples=options.samples, template=options.template, progress=step
        )
    run: result_rows.RunResult = {"method": name, "seed": 0, "fold": None, "metrics": dict(metrics)}
    protocol = {
        "recipe": f"evaluate {benchmark}", "data": benchmark, "split": options.split, "methods": [name],
        "score": "recall@1" if benchmark == "emoji" else "accuracy",
        **({"template": options.template} if benchmark == "emoji" else {"samples": options.samples}),
    }  # fmt: skip
    path = result_rows.write_results(folder / "results.json", result_rows.build_results([run], protocol))
    out.print(_table(metrics))
    out.print(f"results: {path}", soft_wrap=True, highlight=False)
    return 0


def _table(metrics: dict[str, float]) -> Table:
    from rich import box
    from rich.table import Table

    from ..report.text_format import format_value

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("metric", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    for name, value in metrics.items():
        table.add_row(name, format_value(name, value))
    return table
