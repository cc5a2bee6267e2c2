"""The figures of a diagnosis, how sure they are, and what a sentence about them looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..record import number
from .wording import FRACTIONS, SCORES, amount, change

Judgement = Literal["good", "bad", "neutral"]

ERRORS = 2.0
"""Standard errors below which a difference of scores is called "no measurable effect"."""


@dataclass(frozen=True)
class Verdict:
    """One sentence, and what it stands on.

    Attributes:
        key: the rule, and the modality it speaks of, as in "use/audio".
        claim: the sentence in a few words, for a headline.
        text: the whole sentence, with its figures.
        figures: metric name -> value.
        test: name of the test that shows it.
        ok: "good", "bad", or "neutral" where it is a matter of taste or cannot be told.
    """

    key: str
    claim: str
    text: str
    figures: dict[str, float] = field(default_factory=dict)
    test: str = "score"
    ok: Judgement = "neutral"


class Evidence:
    """Read access to the figures of one diagnosis, and how sure its scores are.

    Args:
        content: what ``Diagnosis.to_dict`` gives: names, task, samples, metrics and details.

    The standard error of a score is binomial, sqrt(p (1 - p) / n), or for a regression the standard deviation of the
    samples' errors over sqrt(n). That of a difference adds the two squares, although both scores are of the same
    samples, so it is rather too large than too small: what is called measurable is.

    Example:
        >>> found = Evidence({"names": ["a"], "task": "classification", "samples": 100, "metrics": {"accuracy": 0.5}})
        >>> round(found.error(0.5, 0.5), 4), found.measurable(0.5, 0.6), found.measurable(0.5, 0.7)
        (0.0707, False, True)
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.names = tuple(content["names"])
        self.samples = int(content["samples"])
        self.metrics: Mapping[str, Any] = content["metrics"]
        self.details: Mapping[str, Any] = content.get("details") or {}
        self.score = next((name for name in SCORES if name in self.metrics), "accuracy")
        self.fraction = self.score.startswith(FRACTIONS)
        self._deviation = number((self.details.get("score") or {}).get("deviation"))

    def get(self, metric: str) -> float | None:
        """The figure, or None where it is missing or no number."""
        return number(self.metrics.get(metric))

    def of(self, kind: str, name: str) -> float | None:
        """The score under a condition: ``of("noise", "audio")``."""
        return self.get(f"{self.score}_{kind}/{name}")

    def error(self, *scores: float) -> float:
        """Standard error of the difference of two scores, or of one score; NaN where nothing tells."""
        if self.fraction:
            squares = [max(p * (1 - p), 0.0) / max(self.samples, 1) for p in scores]
        elif self._deviation is None:
            return math.nan
        else:
            squares = [self._deviation**2 / max(self.samples, 1)] * len(scores)
        return math.sqrt(sum(squares))

    def measurable(self, a: float, b: float) -> bool:
        """Whether two scores differ by more than ``ERRORS`` standard errors."""
        error = self.error(a, b)
        return not math.isnan(error) and abs(a - b) > ERRORS * error

    def say(self, value: float) -> str:
        return amount(self.score, value)

    def differ(self, value: float) -> str:
        return change(self.score, value)

    def reach(self, *scores: float) -> str:
        """How large a difference must be to be measurable, in words."""
        size = ERRORS * self.error(*scores)
        return "two standard errors are " + (f"{100 * size:.1f} points" if self.fraction else f"{size:.2g}")
