"""Compares ``eq.watch`` with eager attention on tiny models of many families, and writes docs/watch_families.md."""

import sys
import warnings
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.watch_families import FORMS, FOUND, NOT_BUILT  # noqa: E402
from helpers.watch_sweep import Outcome, check_family  # noqa: E402

HEAD = """# Families on which `eq.watch` is checked

Written by `scripts/watch_families.py` with transformers {version}; the same cases are the slow tests of
`tests/recording/test_watch_families.py`. For every family, a tiny model with random weights is created from its classes
in transformers. The recorded shares are compared with attention matrices from separate hooks and with modality labels
written by hand for each family. Each family is tested with two kinds of inputs: {forms}. *Right* counts the layers
whose shares agree for both; *refused* counts the layers that `record.missing` lists with a reason instead of a share.
`generate` is compared for decoders that process text and media in one sequence.

{families} families, {cases} cases: {right} right with every layer in the table, {partly} right with some layers
refused, {refused} in which all layers where modalities meet are refused, {wrong} wrong.

| family | kind | layers right | layers refused | generate | outcome | reason for refusal |
|---|---|---:|---:|---|---|---|
"""


def verdict(outcomes: list[Outcome]) -> str:
    if any(outcome.wrong for outcome in outcomes):
        return "WRONG"
    if not all(outcome.joint for outcome in outcomes):
        return "refused" if any(outcome.refused for outcome in outcomes) else "right"
    return "right, in part refused" if any(outcome.refused for outcome in outcomes) else "right"


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows, verdicts, wrong = [], [], []
    for name, family in sorted(FOUND.items()):
        outcomes = [check_family(family, form) for form in range(len(FORMS))]
        verdicts.extend(verdict([outcome]) for outcome in outcomes)
        first = outcomes[0]
        reason = next(iter(first.refused.values()), "").split(";")[0]
        right, refused = (" / ".join(str(n) for n in dict.fromkeys(len(getattr(o, kind)) for o in outcomes))
                          for kind in ("right", "refused"))  # fmt: skip
        generate = " / ".join(dict.fromkeys(outcome.generate for outcome in outcomes))
        rows.append(f"| {name} | {family.kind} | {right} | {refused} | {generate} | {verdict(outcomes)} | {reason} |")
        wrong += [f"{name}: {text}" for outcome in outcomes for text in outcome.wrong]
    head = HEAD.format(
        version=transformers.__version__, forms=" and ".join(FORMS), families=len(FOUND), cases=len(verdicts),
        right=verdicts.count("right"), partly=verdicts.count("right, in part refused"),
        refused=verdicts.count("refused"), wrong=verdicts.count("WRONG"),
    )  # fmt: skip
    tail = "\nNot checked, because a tiny model or its inputs could not be created: " + "; ".join(
        f"{name} ({why})" for name, why in NOT_BUILT.items()
    )
    (ROOT / "docs" / "watch_families.md").write_text(head + "\n".join(rows) + "\n" + tail + ".\n")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
