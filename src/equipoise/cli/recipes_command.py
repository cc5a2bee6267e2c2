"""Command ``recipes``: lists and copies packaged recipes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..errors import ConfigError
from ..io.atomic_files import atomic_write, check_file
from ..training import recipes
from .command_line import Parser, described, path


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
