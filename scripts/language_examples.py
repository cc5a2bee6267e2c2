"""Writes docs/language_examples.md: docstrings, error messages and page sentences before and after the language rules.

python scripts/language_examples.py

The places are drawn by a seed, not chosen: the texts of OLD in the history are paired with those of the working tree.
Two texts are a pair if they have the same owner and name, and if the code that they describe has mostly the same
members or arguments; a name that another object has by now is no pair."""

from __future__ import annotations

import ast
import difflib
import random
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLD, SEED = "3b5858d", 0
COUNTS = {"Docstrings": 20, "Error messages": 10, "Sentences of generated pages": 3}
Key = tuple[str, str]
Text = tuple[str, frozenset[str]]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def first_line(node: ast.AST) -> str | None:
    text = ast.get_docstring(node)  # type: ignore[arg-type]
    return text.splitlines()[0] if text else None


def flatten(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code_names(node: ast.FunctionDef | ast.ClassDef) -> frozenset[str]:
    """The members of a class or the arguments of a function."""
    if isinstance(node, ast.ClassDef):
        return frozenset(part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.ClassDef))
    return frozenset(part.arg for part in (*node.args.args, *node.args.kwonlyargs))


def is_same_code(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether at least a third of the names are shared."""
    return not first | second or len(first & second) / len(first | second) >= 1 / 3


def message(call: ast.Call) -> str | None:
    """The text of the error that a ``raise`` creates, without the values put into it."""
    strings = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    text = flatten(" ... ".join(strings))
    return text if len(text) > 40 else None


def collect(sources: dict[str, str]) -> tuple[dict[Key, Text], ...]:
    """(owner, name) -> first docstring line, and (function, error class) -> message, with the names of its code."""
    docstrings: dict[Key, set[Text]] = {}
    errors: dict[Key, set[Text]] = {}
    for text in sources.values():
        for owner in ast.walk(ast.parse(text)):
            if not isinstance(owner, ast.FunctionDef | ast.ClassDef):
                continue
            members = [owner, *owner.body] if isinstance(owner, ast.ClassDef) else [owner]
            for node in members:
                if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    continue
                if line := first_line(node):
                    docstrings.setdefault((owner.name, node.name), set()).add((flatten(line), code_names(node)))
                for part in ast.walk(node):
                    if isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call) and (text_ := message(part.exc)):
                        errors.setdefault((node.name, ast.unparse(part.exc.func)), set()).add((text_, code_names(node)))
    # Only names that occur once: a text is compared with its own successor.
    return tuple(
        {key: next(iter(texts)) for key, texts in part.items() if len({text for text, _ in texts}) == 1}
        for part in (docstrings, errors)
    )


def page_sentences(text: str) -> list[str]:
    """Prose of a Jinja template, without tags and expressions."""
    plain = re.sub(r"\{[{%#].*?[}%#]\}|<[^>]+>", "\n", text, flags=re.DOTALL)
    return [
        flatten(line) for line in plain.splitlines() if len(line.split()) > 6 and "{" not in line and ";" not in line
    ]


def old_files(suffix: str) -> dict[str, str]:
    names = git("ls-tree", "-r", "--name-only", OLD, "src/equipoise").splitlines()
    return {name: git("show", f"{OLD}:{name}") for name in names if name.endswith(suffix)}


def new_files(suffix: str) -> dict[str, str]:
    return {
        str(path): path.read_text(encoding="utf-8") for path in sorted((ROOT / "src/equipoise").rglob("*" + suffix))
    }


def pairs() -> dict[str, list[tuple[str, str, str]]]:
    """section -> (place, before, after) of every text that changed."""
    before, after = collect(old_files(".py")), collect(new_files(".py"))
    found = {
        section: [
            (".".join(dict.fromkeys(key)), old[key][0], new[key][0])
            for key in sorted(old.keys() & new.keys())
            if old[key][0] != new[key][0] and is_same_code(old[key][1], new[key][1])
        ]
        for section, old, new in zip(("Docstrings", "Error messages"), before, after, strict=True)
    }
    current = [line for text in new_files(".j2").values() for line in page_sentences(text)]
    known, sentences = set(current), []
    for name, text in old_files(".j2").items():
        for line in page_sentences(text):
            match = difflib.get_close_matches(line, current, n=1, cutoff=0.5)
            if line not in known and match:
                sentences.append((Path(name).name, line, match[0]))
    found["Sentences of generated pages"] = sentences
    return found


def main() -> None:
    draw = random.Random(SEED)
    lines = [
        "# Before and after",
        "",
        "Texts before and after the [language rules](contributing.md), drawn at random with a fixed seed",
        "by `scripts/language_examples.py`.",
    ]
    for section, changed in pairs().items():
        chosen = draw.sample(changed, min(COUNTS[section], len(changed)))
        lines += ["", f"## {section}", "", "| place | before | after |", "|---|---|---|"]
        lines += [f"| `{place}` | {old} | {new} |" for place, old, new in sorted(chosen)]
    (ROOT / "docs" / "language_examples.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
