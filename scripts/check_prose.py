"""Reports words and phrases that the contributing guide's language rules exclude; exits with 1 if there are any.

python scripts/check_prose.py [FILE ...]"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RULES = {
    r"\bspec \d": "cite the paper's equation instead of a document that is not in the repository",
    r"\b(optim|normal|standard|summar|minim|maxim|initial|regular|synchron|orthogonal|general|recogn)is(?!m|tic)\w+": (
        "use American spelling (-ize)"
    ),
    # A quoted word is a value of stored data, such as the family "colour" in emoji.npz.
    r"(?<!aria-)(?<!\")\b(colour|behaviour|favour|neighbour|labell|modell(?=ed|ing)|centred|grey|catalogue)\w*": (
        "use American spelling"
    ),
    r"\b(the house|the disease|the cure|cures|witness|strangers?|the golden rule|proving "
    r"ground|dice)\b": "no metaphors",
    r"\bvot(e|es|ing)\b(?! of)": "heads do not vote: logits are added (ensemble)",
    r"\b(optimiser|standardised|normalised|initialised|behaviour)": "use American spelling, also in identifiers",
    r"\b(as if nothing had happened|goes? on from there|turns? deaf|deaf to)\b": "no metaphors",
    r"\bcut short\b": "write truncated or interrupted",
    r"\b(nobody|somebody|everybody|anybody|whoever|strangeness)\b": "name the object: module, user, process",
    r"\b(layer|model|module|method|optimizer|process|tensor|signature|balancer|head)s? (itself "
    r")?(knows?|tells?|says|wants?|asks?)\b": ("a module is not a person: it has, returns, computes or stores"),
    r"\b(files?|frames?|tensors?|keys|pixels|values|it|they|what) (lies?|stands?)\b(?! (for|between|in \[|at or))": (
        "write is located, is stored or is at"
    ),
    r"\b(leaves? no trace|nothing is lost|keeps? to itself|is worth something|sitting)\b": "say which state is "
    "restored or kept",
    r"\bdef test_\w*_(told|refused|left_out|left_behind|no_trace)\b": "name the outcome: raises, is_excluded, "
    "is_reported, is_restored",
    r"\bdef test_(what|whoever|nothing|nobody|where)_\w+": "begin with the thing that is tested",
    r"\b(eyesight|towers that|speaks? of|is told (?!apart)|are told (?!apart))": "name the thing first, then say "
    "what is done to it",
    r"\bjudg(e|ed|es|ing|ement)\b": "use evaluate",
}
SKIP = re.compile(r"(^|/)(check_prose\.py|language_examples\.md|CHANGELOG\.md)$|\.ipynb$")


def check(path: Path) -> list[str]:
    """One line for each match in a file."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        for pattern, why in RULES.items():
            if match := re.search(pattern, line, re.IGNORECASE):
                found.append(f"{path}:{number}: '{match.group(0)}': {why}")
    return found


def main() -> int:
    named = [Path(name) for name in sys.argv[1:]]
    if not named:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
        named = [ROOT / name for name in listed.stdout.splitlines()]
        if listed.returncode:
            # Not a Git repository, such as an unpacked archive.
            folders = ("docs", "src", "tests", "scripts", "benchmarks", "examples")
            named = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    files = [p for p in named if p.suffix in {".py", ".md", ".j2", ".js", ".yaml", ".toml"} and not SKIP.search(str(p))]
    found = [line for path in files if path.is_file() for line in check(path)]
    print("\n".join(found))  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
