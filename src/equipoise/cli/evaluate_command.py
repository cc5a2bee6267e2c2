"""``equipoise evaluate``: evaluates a pretrained model on benchmarks or on your questions."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    "equipoise evaluate openai/clip-vit-base-patch32 --data minimal_pairs      Winoground scores on pairs of scenes",
    "equipoise evaluate models/mine --data questions.jsonl --limit 100  your questions, with and without their images",
)

BENCHMARKS = ("emoji", "scenes", "minimal_pairs")


def evaluate_parser() -> Parser:
    parser = described(
        "Evaluates a Hugging Face model on the benchmarks of this library: retrieval of emoji by name, questions "
        "about scenes, also with a shuffled and with a blank image, or pairs of scenes whose captions have the same "
        "words; or on your own questions about images or sounds, with and without them.", *EXAMPLES,
    )  # fmt: skip
    parser.add_argument("model", help="model id on the Hugging Face Hub, or a folder written by save_pretrained")
    parser.add_argument(
        "--data", default=None,
        help="emoji or scenes (by default the one that fits the model), or minimal_pairs; or a csv, jsonl or parquet "
        "file with image, images or audio, question, answer, and optionally choices and category",
    )  # fmt: skip
    parser.add_argument(
        "--level", type=whole, default=2, help="difficulty of scenes: 1, 2 or 3; of minimal_pairs: 2 or 3"
    )
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument(
        "--samples",
        type=whole,
        default=200,
        help="number of scenes, each evaluated three times, or of pairs of each kind",
    )
    parser.add_argument("--template", default="{}", help='caption or prompt template, such as "an emoji of {}"')
    parser.add_argument("--limit", type=whole, default=None, help="own questions: number of leading questions")
    parser.add_argument(
        "--conditions", default=None, help="own questions: some of given,blank,other,hidden,none; all by default"
    )
    parser.add_argument(
        "--score", choices=("auto", "likelihood", "generated"), default="auto",
        help="own questions: log-likelihood of choices, or generated answers; auto: by whether there are choices",
    )  # fmt: skip
    parser.add_argument(
        "--metric", choices=("exact", "normalized", "choice"), default=None, help="own questions: generated answers"
    )
    parser.add_argument("--max_new_tokens", type=whole, default=16, help="own questions: length limit of answers")
    parser.add_argument("--batch_size", type=whole, default=1, help="own questions: questions in one forward pass")
    parser.add_argument(
        "--steer", type=numbers, default=(), metavar="=-2,-1,1,2",
        help="own questions: numbers added to the attention logits of the media in further passes, for a curve",
    )  # fmt: skip
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="own questions: of the images of other questions; minimal_pairs: of the pairs",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; an accelerator if available by default")
    parser.add_argument("--dtype", default=None, help="data type of a generative model; auto by default")
    parser.add_argument("--out", type=path, default=None, help="output folder; runs/evaluate-<name> by default")
    return parser


def numbers(text: str) -> tuple[float, ...]:
    """Converts numbers that are separated by commas."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ArgumentTypeError(
            f"expected numbers separated by commas, such as --steer=-2,-1,1,2, got '{text}'"
        ) from None


def evaluate(options: Namespace) -> int:
    from .. import data
    from ..evaluation import evaluate as evaluate_model
    from ..evaluation import score_pairs
    from ..evaluation.model_loading import load_for_benchmark, matching_benchmark
    from .console import out
    from .progress_bars import progress_iterator

    model = Path(options.model)
    name = model.resolve().name if model.name in ("", "..") else model.name
    folder = options.out or Path("runs") / check_path_component(f"evaluate-{name}", "evaluate")
    check_folder(folder, "evaluate")
    if options.data not in (None, *BENCHMARKS):
        return _evaluate_questions(options, name, folder)
    benchmark = options.data or matching_benchmark(options.model)
    settings = {"emoji": {}, "scenes": {"level": options.level}, "minimal_pairs": {
        "level": options.level, "pairs": options.samples, "seed": options.seed}}[benchmark]  # fmt: skip
    source = data.load_dataset(benchmark, **settings)
    with out.status("loading the model"):
        loaded = load_for_benchmark(benchmark, options.model, dtype=options.dtype, device=options.device)
    scored = None
    with progress_iterator("evaluating", out) as step:
        if benchmark == "minimal_pairs":
            scored = score_pairs(*loaded, source, split=options.split, template=options.template, progress=step)  # pyright: ignore[reportArgumentType]
            metrics = scored.metrics()
        else:
            metrics = evaluate_model(
                *loaded, source, split=options.split, samples=options.samples, template=options.template, progress=step
            )
    run: result_rows.RunResult = {"method": name, "seed": 0, "fold": None, "metrics": dict(metrics)}
    if scored is not None:
        run["intervals"] = scored.intervals()
    protocol = {
        "recipe": f"evaluate {benchmark}", "data": benchmark, "split": options.split, "methods": [name],
        "score": {"emoji": "recall@1", "scenes": "accuracy", "minimal_pairs": "group"}[benchmark],
        **({"template": options.template} if benchmark != "scenes" else {}),
        **({"samples": options.samples} if benchmark != "emoji" else {}),
        **(settings if benchmark == "minimal_pairs" else {}),
    }  # fmt: skip
    path = result_rows.write_results(folder / "results.json", result_rows.build_results([run], protocol))
    if scored is None:
        out.print(_table(metrics))
    else:
        out.print(scored.table(), soft_wrap=True, highlight=False, markup=False)
        out.print(f"pairs: {scored.save(folder)}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"results: {path}", soft_wrap=True, highlight=False)
    return 0


def _evaluate_questions(options: Namespace, name: str, folder: Path) -> int:
    from ..data.tables.table_reading import read_table
    from ..evaluation.questions import evaluate_questions
    from ..evaluation.questions.model_questions import CONDITIONS
    from ..inspection import load_pretrained
    from .console import out
    from .progress_bars import counted_progress

    table = read_table(options.data)
    rows: Any = table if options.limit is None else table.select(range(min(options.limit, len(table))))
    source = Path(options.data)
    with out.status("loading the model"):
        model, processor = load_pretrained(options.model, dtype=options.dtype, device=options.device, who="evaluate")
    with counted_progress("evaluating", "replies", out) as progress:
        result = evaluate_questions(
            model, processor, list(rows), score=options.score, metric=options.metric, template=options.template,
            max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, seed=options.seed, name=name,
            steer=options.steer,
            journal=folder / "journal.jsonl", root=source.parent if source.is_file() else None, progress=progress,
            conditions=CONDITIONS if options.conditions is None else tuple(options.conditions.split(",")),
        )  # fmt: skip
    out.print(result.table(), soft_wrap=True, highlight=False, markup=False)
    out.print(f"results: {result.save(folder)}", soft_wrap=True, highlight=False, markup=False)
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
