"""``equipoise look``: shows the attention of a Hugging Face model for a prompt; writes ``look.json`` and a page."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..io.atomic_files import check_folder
from .command_line import Parser, described, path, whole

EXAMPLES = (
    'equipoise look llava-hf/llava-1.5-7b-hf --image cat.png --text "What is on the mat?"',
    'equipoise look models/mine --image cat.png --text "Is this a dog?" --answer "No"   how likely is it, and why',
    'equipoise look models/mine --audio dog.wav --text "What do you hear?"',
    "equipoise look models/configuration --random --image cat.png --text hello   no weights are needed",
)


def look_parser() -> Parser:
    parser = described(
        "Shows what a vision-language or audio model attends to while it answers, and whether the answer needs it: "
        "table, look.json, report.html.",
        *EXAMPLES,
    )
    parser.add_argument("model", help="model id on the Hugging Face Hub, or a folder written by save_pretrained")
    parser.add_argument(
        "--image", type=path, action="append", default=None, help="image; give the option again for several images"
    )
    parser.add_argument("--audio", type=path, default=None, help="sound file, for a model with audio input")
    parser.add_argument("--text", default="", help="question, with the chat template; none for speech recognition")
    parser.add_argument("--answer", default=None, help="an answer to score; by default the model generates one")
    parser.add_argument("--max_new_tokens", type=whole, default=20, help="length limit of the generated answer")
    parser.add_argument("--layers", default=None, help="comma-separated patterns of layers; all by default")
    parser.add_argument(
        "--exclude_top_k", type=whole, default=3, help="number of top tokens (attention sinks) to exclude"
    )
    parser.add_argument("--random", action="store_true", help="random weights from the configuration alone")
    parser.add_argument("--revision", default=None, help="branch, tag or commit on the hub")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; an accelerator if available by default")
    parser.add_argument("--dtype", default=None, help="auto, float32, bfloat16 or float16; auto by default")
    parser.add_argument("--out", type=path, default=Path("runs/look"), help="folder of look.json and report.html")
    return parser


def look(options: Namespace) -> int:
    """Loads the model, runs the prompt, and writes the result."""
    from ..data.media_files import load_image
    from ..inspection import load_pretrained, look
    from ..inspection.dummy_processor import DummyProcessor
    from ..report import look_html  # noqa: F401  (a missing package is reported before the model is loaded)
    from .console import out

    check_folder(options.out, "look")
    # Load the image first: an invalid one is reported before the model is loaded.
    image = None if options.image is None else [load_image(one, who="look image") for one in options.image]
    notes = []
    with out.status("loading the model") as status:
        loaded = load_pretrained(
            options.model, random=options.random, revision=options.revision, dtype=options.dtype,
            device=options.device,
        )  # fmt: skip
        if options.random:
            notes.append("The weights are random: the values say nothing about a trained model.")
        if isinstance(loaded.processor, DummyProcessor):
            notes.append("Without tokenizer files, every byte of the text is a token.")
        result = look(
            *loaded, image=image, audio=options.audio, text=options.text, answer=options.answer,
            max_new_tokens=options.max_new_tokens, exclude_top_k=options.exclude_top_k,
            layers=None if options.layers is None else [part.strip() for part in options.layers.split(",")],
            name=options.model, notes=notes, progress=status.update,
        )  # fmt: skip
        status.update("writing the page")
        path = result.save(options.out)
        page = result.report(options.out / "report.html")
    out.print(result.table(), highlight=False, markup=False, soft_wrap=True)
    out.print()
    for line in (*notes, *_verdict_lines(result.to_dict())):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.print(f"answer:  {result.answer}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"numbers: {path}", highlight=False, soft_wrap=True)
    out.print(f"report:  {page}", highlight=False, soft_wrap=True)
    return 0


def _verdict_lines(content: dict) -> list[str]:
    """Returns the first sentences of the page."""
    from ..report.look_sentences import MeanShares, verdict

    return verdict(MeanShares(content))
