"""``Diagnosis``: results of a diagnosis, which can be saved, loaded, compared and reported."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, SchemaError, require_extra
from ...io.atomic_files import atomic_write, read_json, to_jsonable
from ...io.checksums import add_checksum, verify_checksum
from ...io.table_display import html_table, to_pandas

if TYPE_CHECKING:
    from ...report.verdict_list import Verdict
    from ...results.result_rows import RunResult

SCHEMA = 1
FILE, PAGE = "diagnosis.json", "report.html"
PARTS = {
    "name": str, "names": list, "samples": int, "seed": int, "metrics": Mapping, "verdicts": list, "details": Mapping,
    "skipped": Mapping, "protocol": Mapping, "environment": Mapping,
}  # fmt: skip
AGAIN = "Run equipoise diagnose again."


def _environment() -> dict[str, Any]:
    from ...results.result_rows import describe_environment

    return describe_environment()


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Results of the diagnosis of a model.

    Attributes:
        name: of the model.
        names: of its modalities.
        task: "classification", "multilabel" or "regression"; None for a model without task.
        samples: number of samples.
        metrics: metric name -> value; see docs/diagnose.md for the names.
        verdicts: findings, most important first.
        details: test -> data of its figures, JSON-able.
        skipped: test -> reason why it was not run.
        protocol: settings of the diagnosis.
        seed, fold: of the training, if known.
        environment: versions and hardware.
    """

    name: str
    names: tuple[str, ...]
    task: str | None
    samples: int
    metrics: dict[str, float]
    verdicts: tuple[Verdict, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    fold: str | None = None
    environment: dict[str, Any] = field(default_factory=_environment)

    def __str__(self) -> str:
        """The headline, and one line for each finding."""
        from ...report.verdict_list import headline

        lines = [headline(self.name, list(self.verdicts))]
        return "\n".join([*lines, *(f"{MARKS[verdict.ok]} {verdict.text}" for verdict in self.verdicts)])

    def to_pandas(self) -> Any:
        """Returns the metrics as a ``pandas.DataFrame`` with the columns model, metric and value.

        Raises:
            ConfigError: pandas is not installed.
        """
        rows = [{"model": self.name, "metric": name, "value": value} for name, value in self.metrics.items()]
        return to_pandas(rows, "Diagnosis")

    def _repr_html_(self) -> str:
        """The headline and the findings, and the metrics as a table that can be opened."""
        first, *findings = str(self).splitlines()
        skipped = [f". {name}: not run, {reason}" for name, reason in self.skipped.items()]
        items = "".join(f"<li>{escape(line)}</li>" for line in (*findings, *skipped))
        metrics = html_table([{"metric": name, "value": value} for name, value in self.metrics.items()])
        return f"<p><b>{escape(first)}</b></p><ul>{items}</ul><details><summary>metrics</summary>{metrics}</details>"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``diagnosis.json``; NaN and infinite values are None."""
        content = {"schema": SCHEMA, "kind": "diagnosis", **{name: getattr(self, name) for name in FIELDS}}
        return to_jsonable({**content, "verdicts": [asdict(verdict) for verdict in self.verdicts]}, FILE)

    def to_run(self) -> RunResult:
        """Returns the diagnosis as one run of a ``results.json``."""
        run: dict[str, Any] = {"method": self.name, "seed": self.seed, "fold": self.fold, "metrics": self.metrics}
        response, keys = self.details.get("response"), self.details.get("keys")
        if response is not None:
            run |= {"shares": response["shares"], "noise_modality": response["modality"]}
        if keys is not None:
            run["keys"] = {"after": {"clean": keys["modalities"], "noise": keys["noise"]}}
        return run  # type: ignore[return-value]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``diagnosis.json`` and ``results.json`` atomically and returns the path of the former.

        ``results.json`` has one run in the format of ``equipoise compare``.
        """
        from ...results.result_rows import write_results

        folder = Path(folder)
        content = add_checksum(to_jsonable(self.to_dict()))
        path = atomic_write(folder / FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_results(folder / "results.json", results([self]))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Diagnosis:
        """Loads a saved diagnosis from its file or folder. No code in the file is executed.

        Raises:
            DataError: the file does not exist. SchemaError: the file is not JSON, truncated, of another schema, or
                incomplete.
        """
        from ...report.verdict_list import Verdict

        content = _read(Path(path, FILE) if Path(path).is_dir() else Path(path))
        metrics = {name: math.nan if value is None else float(value) for name, value in content["metrics"].items()}
        verdicts = tuple(Verdict(**verdict) for verdict in content["verdicts"])
        stored = {name: content.get(name) for name in FIELDS}
        return cls(**{**stored, "names": tuple(content["names"]), "metrics": metrics, "verdicts": verdicts})

    def report(self, path: str | os.PathLike[str], *others: Diagnosis) -> Path:
        """Writes a self-contained HTML report of this model, or of several in comparison.

        Args:
            path: the file, or a folder, in which ``report.html`` is written.
            others: diagnoses of further models on the same data.

        Returns:
            The path of the page.
        """
        with require_extra("Diagnosis.report"):
            from ...report.diagnosis_html import diagnosis_page

        path = Path(path)
        page = diagnosis_page([diagnosis.to_dict() for diagnosis in (self, *others)])
        return atomic_write(path / PAGE if path.is_dir() else path, page)


FIELDS = tuple(name for name in Diagnosis.__dataclass_fields__ if name != "verdicts")
MARKS = {"good": "+", "bad": "-", "neutral": "."}


def results(diagnoses: list[Diagnosis]) -> dict[str, Any]:
    """Returns the content of a ``results.json`` with one run for each diagnosis; the first one is the reference."""
    from ...results.result_rows import build_results as collected

    runs = [diagnosis.to_run() for diagnosis in diagnoses]
    replaced = {run["noise_modality"] for run in runs if "noise_modality" in run}
    protocol: dict[str, Any] = {
        **diagnoses[0].protocol,
        "methods": list(dict.fromkeys(run["method"] for run in runs)),
        "modalities": list(dict.fromkeys(name for diagnosis in diagnoses for name in diagnosis.names)),
    }
    if len(replaced) == 1:
        protocol["noise_modality"] = replaced.pop()
    return collected(runs, protocol, default=diagnoses[0].name)


def _read(path: Path) -> dict[str, Any]:
    who = f"Diagnosis.load '{path.name}'"
    try:
        content = read_json(path)
    except OSError as error:
        fix = "equipoise diagnose writes one; pass its path or folder."
        got = "no such file" if isinstance(error, FileNotFoundError) else f"'{path}' ({error.strerror})"
        raise DataError(who, expected="a diagnosis", got=got, fix=fix) from None
    except ValueError as error:
        got = f"a truncated file or another format ({error})"
        raise SchemaError(who, expected="JSON", got=got, fix=AGAIN) from error
    fields = content if isinstance(content, dict) else {"kind": type(content).__name__}
    if fields.get("kind") != "diagnosis" or fields.get("schema") != SCHEMA:
        got = f"{fields.get('kind')!r} of schema {fields.get('schema')!r}"
        raise SchemaError(who, expected=f"a diagnosis of schema {SCHEMA}", got=got, fix=AGAIN)
    wrong = [name for name, kind in PARTS.items() if not isinstance(content.get(name), kind)]
    verdicts = content.get("verdicts")
    if not wrong and not all(_is_verdict(verdict) for verdict in verdicts or ()):
        wrong = ["verdicts"]
    if not wrong and not all(value is None or isinstance(value, (int, float)) for value in content["metrics"].values()):
        wrong = ["metrics"]
    if wrong:
        raise SchemaError(who, expected=f"the entries {', '.join(PARTS)}", got=f"no such {', '.join(wrong)}", fix=AGAIN)
    return verify_checksum(content, who, AGAIN)


def _is_verdict(part: Any) -> bool:
    from ...report.verdict_list import Verdict

    fields = set(Verdict.__dataclass_fields__)
    return (
        isinstance(part, dict)
        and set(part) == fields
        and part["ok"] in MARKS
        and all(isinstance(part[name], str) for name in ("key", "claim", "text", "test"))
        and isinstance(part["figures"], dict)
    )
