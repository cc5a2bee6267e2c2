"""``equipoise judge``: a published model at the work of our own, a table and ``results.json`` out."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich import box
from rich.table import Table

from .. import record
from ..files import check_folder, path_part
from .command import Parser, described, out, path, whole

EXAMPLES = (
    "equipoise judge openai/clip-vit-base-patch32                    two towers: finding emoji and their names",
    'equipoise judge google/siglip-base-patch16-224 --template "an emoji of {}"',
    "equipoise judge llava-hf/llava-1.5-7b-hf --samples 200          one that writes: questions about scenes",
    "equipoise judge Salesforce/blip2-itm-vit-g --data emoji",
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
    from ..published import judge as ask
    from ..published.load import fitting, load_for
    from .progress import counted

    model = Path(options.model)
    name = model.resolve().name if model.name in ("", "..") else model.name
    folder = options.out or Path("runs") / path_part(f"judge-{name}", "judge")
    check_folder(folder, "judge")
    work = options.data or fitting(options.model)
    source = data.load(work, **({"level": options.level} if work == "scenes" else {}))
    with out.status("loading the model"):
        loaded = load_for(work, options.model, dtype=options.dtype, device=options.device)
    with counted("judging", out) as step:
        metrics = ask(
            *loaded, source, split=options.split, samples=options.samples, template=options.template, progress=step
        )
    run: record.Run = {"method": name, "seed": 0, "fold": None, "metrics": dict(metrics)}
    protocol = {
        "recipe": f"judge {work}", "data": work, "split": options.split, "methods": [name],
        "score": "recall@1" if work == "emoji" else "accuracy",
        **({"template": options.template} if work == "emoji" else {"samples": options.samples}),
    }  # fmt: skip
    path = record.write(folder / "results.json", record.results([run], protocol))
    out.print(_table(metrics))
    out.print(f"results: {path}", soft_wrap=True, highlight=False)
    return 0


def _table(metrics: dict[str, float]) -> Table:
    from ..report.wording import amount

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("figure", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    for name, value in metrics.items():
        table.add_row(name, amount(name, value))
    return table
