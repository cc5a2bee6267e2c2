"""``equipoise evaluate``: a published model at the work of our own, a table and ``results.json`` out."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich import box
from rich.table import Table

from ..io.atomic_files import check_folder, check_path_component
from ..results import result_rows
from .command_line import Parser, described, out, path, whole

EXAMPLES = (
    "equipoise evaluate openai/clip-vit-base-patch32                    two towers: finding emoji and their names",
    'equipoise evaluate google/siglip-base-patch16-224 --template "an emoji of {}"',
    "equipoise evaluate llava-hf/llava-1.5-7b-hf --samples 200          one that writes: questions about scenes",
    "equipoise evaluate Salesforce/blip2-itm-vit-g --data emoji",
)


def judge_parser() -> Parser:
    parser = described(
        "Puts a model of Hugging Face to the same work as ours: finding emoji by name, or questions about scenes, also "
        "with the picture shuffled and blank.", *EXAMPLES,
    )  # fmt: skip
    parser.add_argument("model", help="a name on the Hugging Face hub, or a folder of save_pretrained")
    parser.add_argument("--data", choices=("emoji", "scenes"), default=None, help="by default what fits the model")
    parser.add_argument("--level", type=whole, default=2, help="of the scenes: 1, 2 or 3")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--samples", type=whole, default=200, help="of the scenes; each is asked three times")
    parser.add_argument("--template", default="{}", help='for captions, such as "an emoji of {}"')
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the accelerator where there is one")
    parser.add_argument("--dtype", default=None, help="of a model that writes; auto by default")
    parser.add_argument("--out", type=path, default=None, help="folder; runs/judge-<name> by default")
    return parser


def judge(options: Namespace) -> int:
    from .. import data
    from ..evaluation import evaluate as ask
    from ..evaluation.model_loading import load_for_benchmark, matching_benchmark
    from .progress_bars import progress_iterator

    model = Path(options.model)
    name = model.resolve().name if model.name in ("", "..") else model.name
    folder = options.out or Path("runs") / check_path_component(f"judge-{name}", "judge")
    check_folder(folder, "judge")
    work = options.data or matching_benchmark(options.model)
    source = data.load_dataset(work, **({"level": options.level} if work == "scenes" else {}))
    with out.status("loading the model"):
        loaded = load_for_benchmark(work, options.model, dtype=options.dtype, device=options.device)
    with progress_iterator("judging", out) as step:
        metrics = ask(
            *loaded, source, split=options.split, samples=options.samples, template=options.template, progress=step
        )
    run: result_rows.RunResult = {"method": name, "seed": 0, "fold": None, "metrics": dict(metrics)}
    protocol = {
        "recipe": f"judge {work}", "data": work, "split": options.split, "methods": [name],
        "score": "recall@1" if work == "emoji" else "accuracy",
        **({"template": options.template} if work == "emoji" else {"samples": options.samples}),
    }  # fmt: skip
    path = result_rows.write_results(folder / "results.json", result_rows.build_results([run], protocol))
    out.print(_table(metrics))
    out.print(f"results: {path}", soft_wrap=True, highlight=False)
    return 0


def _table(metrics: dict[str, float]) -> Table:
    from ..report.text_format import format_value

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("figure", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    for name, value in metrics.items():
        table.add_row(name, format_value(name, value))
    return table
