"""``equipoise search``: searches images by text or texts by image; prints a table and writes a page."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..io.atomic_files import check_file
from .command_line import Parser, described, path, whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.search import SearchHit, SearchIndex, SearchResult

EXAMPLES = (
    'equipoise search --model runs/emoji "red heart"',
    'equipoise search --model runs/emoji "woman running: dark skin tone" --html gallery.html',
    "equipoise search --model runs/emoji --image cat.png        caption of an image",
    'equipoise search --model runs/emoji "red car" --images photographs/       images in a folder',
    'equipoise search --model runs/products "red shoes"        rows of your own table, see train --pair',
)
WIDTH = 18
"""Width of an image column in the terminal, in characters."""


def search_parser() -> Parser:
    parser = described(
        "Searches images by text, or texts by image, with a model of `equipoise train --config emoji_clip` or one of "
        "your own table, `train --data TABLE --pair image,text`; there also audio.",
        *EXAMPLES,
    )
    parser.add_argument("text", nargs="?", default=None, help="text query")
    parser.add_argument("--model", type=path, required=True, help="folder of a finished run, of train or compare")
    parser.add_argument("--top", type=whole, default=10, help="number of results")
    parser.add_argument("--image", type=path, default=None, help="image query, instead of a text")
    parser.add_argument("--audio", type=path, default=None, help="recording as query, for models of tables with audio")
    parser.add_argument(
        "--images", type=path, default=None, help="search this folder of images instead of the data set"
    )
    parser.add_argument("--split", default=None, help="only rows of train, val or test; all of them by default")
    parser.add_argument("--data", type=path, default=None, help="new location of the table, if it was moved")
    parser.add_argument("--html", type=path, default=None, help="also write the results as a page")
    return parser


def search(options: Namespace) -> int:
    """Loads the model, searches, and prints the result."""
    from .console import out

    queries = [one for one in (options.text, options.image, options.audio) if one is not None]
    if len(queries) != 1:
        raise ConfigError(
            "search", expected="a text, an image after --image, or a recording after --audio",
            got="none" if not queries else "several",
            fix='Write for example: equipoise search --model runs/emoji "red heart".',
        )  # fmt: skip
    if options.top < 1:
        raise ConfigError("search", expected="--top of 1 or more", got=f"{options.top}")
    if options.text is not None and not options.text.strip():
        raise ConfigError("search", expected="a text with a word in it", got=repr(options.text))
    if options.html is not None and not options.html.is_dir():
        check_file(options.html, "search --html")
    with out.status("loading the model"):
        index, notes = build_search_index(options)
    if options.image is not None:
        result = index.search_by_image(options.image, top=options.top)
    elif options.audio is not None:
        result = index.search_by_audio(options.audio, top=options.top)
    else:
        result = index.search_by_text(str(options.text), top=options.top)
    show(result, notes, out)
    if options.html is not None:
        from ..evaluation.search import result_gallery

        page = result_gallery(result, options.html, model=str(options.model), notes=notes)
        out.print(f"gallery: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def build_search_index(options: Namespace) -> tuple[SearchIndex, list[str]]:
    """Builds the search index, and returns it with notes to print."""
    from ..data.sets.manifest import ManifestDataset
    from ..evaluation.search import TableGallery, cached_embeddings, caption_entries, image_entries, index_folder
    from ..evaluation.search.search_index import check_searchable
    from ..training import recipes
    from ..training.run import load_run_dataset
    from ..training.run_loading import finished_run, load, with_data

    run = finished_run(options.model)
    recipe = recipes.load_recipe(options.model / "recipe.yaml")
    source: Any = load_run_dataset(with_data(recipe, options.data), run["fold"])
    model: Any = load(options.model, data=source)
    gallery = TableGallery(source) if isinstance(source, ManifestDataset) and source.task == "retrieval" else None
    check_searchable(model, gallery or source)
    if options.split is not None:
        source.split(options.split)
        if gallery is None:
            raise ConfigError("search --split", expected="a model of your own table", got=recipe.data["name"])
    if options.images is not None:
        index, errors = index_folder(model, gallery or source, options.images)
        return index, [f"Skipped: {error}" for error in errors]
    weights = options.model / "model.safetensors"
    if gallery is not None:
        kind = "text" if options.text is not None else "image" if options.image is not None else "audio"
        gallery.named(kind)
        vectors = cached_embeddings(options.model, weights, gallery, lambda: gallery.vectors(model))
        return gallery.index(model, kind, vectors, options.split), []
    vectors = cached_embeddings(
        options.model, weights, source,
        lambda: {"image": image_entries(model, source).vectors, "text": caption_entries(model, source).vectors},
    )  # fmt: skip
    build_index = image_entries if options.image is None else caption_entries
    return build_index(model, source, vectors["image" if options.image is None else "text"]), []


def show(result: SearchResult, notes: list[str], console: Console) -> None:
    """Prints the result as a table, below images if the terminal has colors."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ..report.search_html import unseen

    if console.is_terminal and console.color_system in ("256", "truecolor"):
        console.print(_image_grid(result.hits, max(1, console.width // (WIDTH + 1))))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for header in ("", "cosine", "", "name", ""):
        table.add_column(header, justify="right" if header == "cosine" else "left", overflow="fold")
    for hit in result.hits:
        new = Text("new", style="green") if hit.entry.seen is False else Text("")
        table.add_row(f"{hit.rank}.", f"{hit.score:.3f}", Text(hit.entry.mark), Text(hit.entry.name), new)
    console.print(table)
    summary = [f"{len(result.hits)} of {result.entries}"]
    summary += [f"{result.tied} more have the same score as the last one"] if result.tied else []
    summary += ["new: not in the training data"] if any(hit.entry.seen is False for hit in result.hits) else []
    console.print("; ".join(summary), style="dim", highlight=False)
    for note in [*unseen({"unseen": result.unseen, "pieces": result.pieces}), *notes]:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _image_grid(hits: list[SearchHit], columns: int) -> Table:
    """Lays the images out in a grid, each with its rank and name below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..evaluation.search.terminal_image import image_to_blocks

    grid = Table.grid(padding=(0, 1, 1, 0))
    cells = [
        Group(image_to_blocks(hit.entry.image, WIDTH - 2), Text(f"{hit.rank}. {hit.entry.name}"))
        for hit in hits
        if hit.entry.image is not None
    ]
    for _ in range(min(columns, len(cells))):
        grid.add_column(width=WIDTH, overflow="fold")
    for start in range(0, len(cells), columns):
        grid.add_row(*cells[start : start + columns])
    return grid
