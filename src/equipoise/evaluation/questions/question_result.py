"""``QuestionResult``: scores of questions under several conditions, with paired intervals."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ...io.atomic_files import atomic_write, make_folder
from ...io.table_display import to_pandas
from ...report.questions_html import questions_page
from ...results.bootstrap import mean_of_resamples, percentile_interval
from ...results.result_rows import to_jsonable
from ...results.significance import paired_p
from .answer_scoring import normalize, yes_or_no
from .media_conditions import STEER
from .question_set import MediaQuestion
from .question_verdict import verdict_sentences

GIVEN = "given"
WITHOUT = ("none", "blank", "hidden")
"""Conditions without the medium, of which the one with the highest accuracy counts as "without"."""
TITLES = {
    "given": "as given",
    "blank": "blank",
    "other": "another question's",
    "none": "text only",
    "hidden": "hidden from attention",
}
SCHEMA = 1


@dataclass(eq=False)
class QuestionResult:
    """Scores of each question under each condition.

    Attributes:
        questions: the questions.
        conditions: names of the conditions; the first is "given".
        replies: condition -> reply to each question; None for a failed call.
        scores: condition -> (question,) scores from 0 to 1; NaN for a failed call.
        errors: (condition, index of the question) -> why the call failed.
        metric: name of the score.
        name: of the target.
        extra: further values by question, such as the share of attention.
        betas: numbers that were added to the attention logits of the media, with 0; empty if none.
        notes: sentences on conditions and values that the target does not have.
    """

    questions: Sequence[MediaQuestion]
    conditions: tuple[str, ...]
    replies: dict[str, list[str | None]]
    scores: dict[str, np.ndarray]
    errors: dict[tuple[str, int], str] = field(default_factory=dict)
    metric: str = ""
    name: str = ""
    extra: dict[str, list[float | None]] = field(default_factory=dict)
    betas: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def medium(self) -> str:
        """Kind of media of the questions: "image", "audio", or "media" for both."""
        names = {name for question in self.questions for name, _ in question.media}
        return names.pop() if len(names) == 1 else "media"

    @property
    def accuracy(self) -> dict[str, float]:
        """condition -> mean score of the questions that were answered."""
        return {name: _mean(self.scores[name]) for name in self.conditions}

    @property
    def failed(self) -> int:
        """Number of failed calls."""
        return len(self.errors)

    def interval(self, condition: str) -> list[float] | None:
        """The 95 % bootstrap interval of the accuracy under a condition; None for fewer than two answered questions."""
        return _interval(self.scores[condition][np.isfinite(self.scores[condition])])

    def difference(self, condition: str) -> dict[str, Any]:
        """The accuracy as given minus that under a condition, over the questions answered under both.

        Returns:
            {"difference", "interval", "p", "questions"}: p by McNemar's test for scores of 0 and 1, else by a
            bootstrap.
        """
        first, second = self._paired(condition)
        if not len(first):
            return {"difference": None, "interval": None, "p": None, "questions": 0}
        interval = None if len(first) < 2 else percentile_interval(mean_of_resamples(first - second))
        return {
            "difference": float((first - second).mean()), "interval": interval, "p": paired_p(first, second),
            "questions": len(first),
        }  # fmt: skip

    @property
    def without(self) -> str | None:
        """The condition without the medium that has the highest accuracy; None if there is none."""
        conditions = [name for name in WITHOUT if name in self.conditions and np.isfinite(self.scores[name]).any()]
        return max(conditions, key=lambda name: self.accuracy[name]) if conditions else None

    @property
    def as_well(self) -> float | None:
        """Fraction of the questions whose score without the medium is at least the score as given."""
        if self.without is None:
            return None
        first, second = self._paired(self.without)
        return float((second >= first).mean()) if len(first) else None

    @property
    def needing(self) -> list[int]:
        """Indices of questions answered correctly as given, but in fewer than half of the conditions without media."""
        return self._indices(lambda given, rest: given >= 0.5 and rest < 0.5)

    @property
    def answered_without(self) -> list[int]:
        """Indices of the questions answered correctly as given and in at least half of the conditions without media."""
        return self._indices(lambda given, rest: given >= 0.5 and rest >= 0.5)

    @property
    def chance(self) -> float:
        """The accuracy of guessing: 1 / number of choices, or the most frequent answer if that is right more often."""
        frequent: dict[str, int] = {}
        guess = 0.0
        for question in self.questions:
            guess += 1 / len(question.choices) if question.choices else 0.0
            answer = normalize(question.answers[0])
            frequent[answer] = frequent.get(answer, 0) + 1
        most = max(frequent.values())
        # Answers that differ for all questions cannot be guessed by their frequency.
        return max(guess, most if most > 1 else 0) / len(self.questions)

    @property
    def yes_no(self) -> dict[str, dict[str, float]]:
        """condition -> {"questions", "yes_answers", "yes_replies", "precision", "recall", "f1"} of questions whose
        answer is yes or no; empty without such questions. A rate of yes above that of the answers is a bias."""
        rates = {}
        for name in self.conditions:
            pairs = []
            for question, reply in zip(self.questions, self.replies[name], strict=True):
                right = normalize(question.answers[0])
                if right in ("yes", "no") and reply is not None:
                    pairs.append((right == "yes", yes_or_no(reply) == "yes"))
            if pairs:
                answers, replies = np.array(pairs).T
                hits = int((answers & replies).sum())
                precision = hits / max(int(replies.sum()), 1)
                recall = hits / max(int(answers.sum()), 1)
                rates[name] = {
                    "questions": len(pairs),
                    "yes_answers": float(answers.mean()),
                    "yes_replies": float(replies.mean()),
                    "precision": precision,
                    "recall": recall,
                    "f1": 2 * precision * recall / max(precision + recall, 1e-12),
                }
        return rates

    @property
    def by_category(self) -> dict[str, dict[str, float]]:
        """category -> {"questions", condition: accuracy}; empty without categories."""
        names = list(dict.fromkeys(question.category for question in self.questions))
        categories = {}
        for category in names if names != [""] else ():
            rows = np.array([question.category == category for question in self.questions])
            categories[category] = {
                "questions": int(rows.sum()),
                **{name: _mean(self.scores[name][rows]) for name in self.conditions},
            }
        return categories

    @property
    def steering(self) -> list[dict[str, Any]]:
        """One dict for each number added to the attention logits of the media, in ascending order.

        {"beta", "accuracy", "interval", "attention_share", "log_likelihood", "log_likelihood_interval"}: means over
        the questions; the log-likelihood of the right choice in nats per token, None for generated answers.
        """
        rows = []
        for beta in self.betas:
            prefix = f"{STEER}{beta:g}"
            scores = _known(self.extra[prefix] if beta else list(self.scores[GIVEN]))
            share, likely = (
                _known(self.extra.get(f"{prefix} {name}" if beta else name, ()))
                for name in ("attention_share", "log_likelihood")
            )
            rows.append({
                "beta": beta, "accuracy": _finite(_mean(scores)), "interval": _interval(scores),
                "attention_share": _finite(_mean(share)), "log_likelihood": _finite(_mean(likely)),
                "log_likelihood_interval": _interval(likely),
            })  # fmt: skip
        return rows

    @property
    def verdict(self) -> str:
        """Summary of the scores in a few sentences."""
        return " ".join(verdict_sentences(self))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict for each question: its text, answer, and the score and reply under each condition."""
        rows = []
        needing, without = set(self.needing), set(self.answered_without)
        for index, question in enumerate(self.questions):
            row: dict[str, Any] = {
                "index": question.index, "id": question.sample.get("id", question.index), "category": question.category,
                "question": question.text, "answer": question.answers[0],
            }  # fmt: skip
            for name in self.conditions:
                score = float(self.scores[name][index])
                row[name] = None if np.isnan(score) else score
                row[f"{name}_reply"] = self.replies[name][index]
            errors = [f"{name}: {self.errors[name, index]}" for name in self.conditions if (name, index) in self.errors]
            needs = "needs it" if index in needing else "answered without it" if index in without else "not answered"
            row |= {"class": "failed" if np.isnan(self.scores[GIVEN][index]) else needs, "error": "; ".join(errors)}
            row |= {name: values[index] for name, values in self.extra.items()}
            rows.append(row)
        return rows

    def table(self) -> str:
        """Accuracy by condition with intervals, differences from "as given", and p-values, as text."""
        lines = [f"{self.medium:<24}{'accuracy':>10}{'95 % interval':>18}{'difference':>12}{'p':>8}"]
        for name in self.conditions:
            value, interval = self.accuracy[name], self.interval(name)
            line = f"{TITLES[name]:<24}{_percent(value):>10}"
            line += f"{'' if interval is None else f'{100 * interval[0]:.1f} to {100 * interval[1]:.1f}':>18}"
            if name != GIVEN:
                change = self.difference(name)
                if change["difference"] is not None:
                    p = "<.001" if change["p"] < 0.001 else f"{change['p']:.3f}"
                    line += f"{0.0 - 100 * change['difference']:>+12.1f}{p:>8}"
            lines.append(line.rstrip())
        lines += self._steering_lines()
        lines += [f"{'chance':<24}{_percent(self.chance):>10}", "", self.verdict]
        return "\n".join(lines)

    def _steering_lines(self) -> list[str]:
        return [
            f"{'steered by ' + format(row['beta'], '+g'):<24}{_percent(row['accuracy']):>10}"
            f"{'' if row['interval'] is None else '{:.1f} to {:.1f}'.format(*(100 * v for v in row['interval'])):>18}"
            for row in self.steering if row["beta"]
        ]  # fmt: skip

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.table())}</pre>"

    def to_pandas(self) -> Any:
        """Returns ``rows`` as a ``pandas.DataFrame``.

        Raises:
            ConfigError: pandas is not installed.
        """
        return to_pandas(self.rows, "QuestionResult")

    def to_dict(self) -> dict[str, Any]:
        """All figures and rows as JSON types."""
        return to_jsonable({
            "kind": "questions", "schema": SCHEMA, "name": self.name, "metric": self.metric, "medium": self.medium,
            "questions": len(self.questions), "verdict": self.verdict, "sentences": verdict_sentences(self),
            "conditions": {name: self._figures(name) for name in self.conditions},
            "chance": self.chance, "without": self.without, "as_well": self.as_well, "needing": len(self.needing),
            "answered_without": len(self.answered_without), "failed": self.failed, "yes_no": self.yes_no,
            "by_category": {
                name: {key: _finite(value) for key, value in row.items()} for name, row in self.by_category.items()
            },
            "means": {name: _finite(_mean(_known(values))) for name, values in self.extra.items()},
            "steering": self.steering,
            "rows": self.rows,
        })  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Writes ``questions.json``, ``questions.csv`` and the page ``questions.html``; returns the folder.

        Raises:
            ConfigError: the folder cannot be written.
        """
        folder = Path(folder)
        make_folder(folder, "questions")
        content = self.to_dict()
        atomic_write(folder / "questions.json", json.dumps(content, indent=1, allow_nan=False))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [*self.rows[0]])
        writer.writeheader()
        writer.writerows([{key: "" if value is None else value for key, value in row.items()} for row in self.rows])
        atomic_write(folder / "questions.csv", text.getvalue())
        atomic_write(folder / "questions.html", questions_page(content))
        return folder

    def _figures(self, condition: str) -> dict[str, Any]:
        change = {} if condition == GIVEN else self.difference(condition)
        if "interval" in change:
            change["interval_of_difference"] = change.pop("interval")
        accuracy = _finite(self.accuracy[condition])
        return {"title": TITLES[condition], "accuracy": accuracy, "interval": self.interval(condition)} | change

    def _paired(self, condition: str) -> tuple[np.ndarray, np.ndarray]:
        first, second = self.scores[GIVEN], self.scores[condition]
        both = np.isfinite(first) & np.isfinite(second)
        return first[both], second[both]

    def _indices(self, rule: Any) -> list[int]:
        conditions = [name for name in WITHOUT if name in self.conditions]
        if not conditions:
            return []
        indices = []
        for index in range(len(self.questions)):
            rest = [self.scores[name][index] for name in conditions if np.isfinite(self.scores[name][index])]
            if (
                rest
                and np.isfinite(self.scores[GIVEN][index])
                and rule(self.scores[GIVEN][index], sum(rest) / len(rest))
            ):
                indices.append(index)
        return indices


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _known(values: Sequence[float | None]) -> np.ndarray:
    array = np.array([np.nan if value is None else value for value in values], dtype=float)
    return array[np.isfinite(array)]


def _interval(values: np.ndarray) -> list[float] | None:
    return None if len(values) < 2 else percentile_interval(mean_of_resamples(values))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{100 * value:.1f} %"
