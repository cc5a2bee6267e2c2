"""Shared state of the tests of one diagnosis: model, batches, noise settings and cached forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, unknown_name
from ...recording import AttentionRecord, watch
from ...results.bootstrap import percentile_interval, resampled_values
from ...results.significance import pack_outcomes, pack_resamples
from ...results.task_metrics import Metric
from ...tokens.token_batch import Output, as_output
from ..noise_test import input_statistics, most_attended
from ..prediction_collection import CollectedPredictions, NoiseSource, collect_predictions, named_batches
from ..task_scores import SCORES, outcomes, score_name
from .layer_tests import attends, residuals

Loader = Iterable[Mapping[str, Any]]


class SkippedTest(Exception):
    """Raised by a test that does not apply to the model, with the reason."""


@dataclass(eq=False)
class DiagnosticContext:
    """Shared state of one diagnosis.

    Args:
        model: a FusionModel.
        batches: function that returns the same batches on each call.
        noise: name -> (mean, std) of the noise; empty for those of the inputs of the loader.
        outside: out-of-distribution batches, or None.
        modality: modality that is replaced by noise for the response of attention; None for the most attended one.
        seed: of all noise.
        alone: name -> score of a unimodal model, or the outcome of each sample; empty to use the unimodal heads.
        tokens: name -> names of its tokens.
        metric: replaces the score of the task; None for that score.
        others: metrics that are measured beside it.
    """

    model: nn.Module
    batches: Callable[[], Loader]
    noise: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    outside: Loader | None = None
    modality: str | None = None
    seed: int = 0
    alone: Mapping[str, float | Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[str]] = field(default_factory=dict)
    metric: Metric | None = None
    others: Sequence[Metric] = ()

    def __post_init__(self) -> None:
        self.heads: dict[str, list[Tensor]] = {}
        self.has: dict[str, list[Tensor]] = {}
        self.seen: AttentionRecord | None = None
        self.residuals: dict[str, list[Tensor]] = {}
        self._noisy: dict[str, CollectedPredictions] = {}
        self._statistics: dict[str, tuple[float, float]] = {}

    def run_clean_pass(self) -> None:
        """Runs the model on the unmodified inputs and records attention, unimodal logits and residuals."""
        fusion = getattr(self.model, "fusion", None)
        with warnings.catch_warnings(), ExitStack() as stack:
            # Some fusions have attention over keys that mix modalities (the joint stream of JMT, for example). The test
            # of attention uses the other layers, and is skipped if there are none.
            warnings.filterwarnings("ignore", message="watch: ", category=UserWarning)
            stack.callback(self.model.register_forward_hook(self._keep).remove)
            if hasattr(self.model, "key_labeler"):
                self.seen = stack.enter_context(watch(self.model))
            elif fusion is not None and attends(fusion):
                self.seen = stack.enter_context(watch(self.model))
                self.residuals = stack.enter_context(residuals(fusion))
            self.clean = collect_predictions(self.model, self.batches())
        self.names = self.clean.names
        # Other models may have no task; then only attention can be tested.
        self.task = getattr(self.model, "task", None)

    def _keep(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Stores the logits of the unimodal heads, and which samples have the modality."""
        if isinstance(output, Output) or hasattr(model, "output_of"):
            output = as_output(model, output, "diagnose")
            for name, logits in output.unimodal_logits.items():
                self.heads.setdefault(name, []).append(logits.detach().float().cpu())
                self.has.setdefault(name, []).append(output.tokens[name].present().cpu())

    @property
    def score(self) -> str:
        """Name of the score of the task, or of the metric that replaces it."""
        return self.metric.name if self.metric is not None else SCORES.get(str(self.task), "accuracy")

    @property
    def samples(self) -> int:
        return len(self.clean.logits)

    @property
    def replaced(self) -> str:
        """The modality that is replaced by noise for the response of attention."""
        return self.modality or most_attended(self.clean)

    def worth(self, logits: Tensor, target: Tensor | None = None) -> float:
        """Score of predictions on the samples of the diagnosis."""
        target = self.clean.target if target is None else target
        return score_name(self.model, logits, target, "diagnose", self.metric)

    def evidence(self, logits: Mapping[str, Tensor]) -> dict[str, Any]:
        """Details of a test that later comparisons need, for the predictions behind each score.

        The outcome of every sample, or the metric of every resample for a metric that is no mean of outcomes, with the
        95 % interval of the metric.
        """
        task, target = str(self.task), self.clean.target
        if self.metric is None:
            return {"outcomes": {name: pack_outcomes(outcomes(one, target, task)) for name, one in logits.items()}}
        result: dict[str, Any] = {"outcomes": {}, "resamples": {}, "intervals": {}}
        for name, one in logits.items():
            each, values = self.metric.each(one, target, task), resampled_values(self.metric, one, target, task)
            if each is not None:
                result["outcomes"][name] = pack_outcomes(each)
            elif np.isfinite(values).any():
                result["resamples"][name] = pack_resamples(values)
            if (interval := percentile_interval(values)) is not None:
                result["intervals"][name] = interval
        return result

    def noisy(self, name: str) -> CollectedPredictions:
        """Predictions with one modality replaced by noise."""
        if name not in self._noisy:
            noise = NoiseSource(name, *self.statistics(name), seed=self.seed)
            noisy = self._noisy[name] = collect_predictions(self.model, self.batches(), noise=noise)
            if noisy.target.shape != self.clean.target.shape or not torch.equal(noisy.target, self.clean.target):
                raise ConfigError(
                    "diagnose", expected="the same batches in the same order each time", got="different targets",
                    fix="Disable shuffling: DataLoader(..., shuffle=False).",
                )  # fmt: skip
        return self._noisy[name]

    def noisy_own(self, name: str) -> CollectedPredictions:
        """Predictions with one modality replaced by noise of the mean and standard deviation of each sample."""
        noise = NoiseSource(name, *self.statistics(name), seed=self.seed, distribution="per_sample")
        return collect_predictions(self.model, self.batches(), noise=noise)

    def statistics(self, name: str) -> tuple[float, float]:
        """(mean, standard deviation) of the noise that replaces a modality."""
        if name in self.noise:
            return self.noise[name]
        if name not in self._statistics:
            self._statistics[name] = input_statistics(self.batches(), name, who="diagnose")
        return self._statistics[name]

    def needs_targets(self) -> None:
        if self.task not in SCORES:
            raise SkippedTest(f"the model has no task ({', '.join(SCORES)}), so its predictions have no score")
        if not len(self.clean.target):
            raise SkippedTest("the batches have no target")

    def needs_several(self, why: str) -> None:
        if len(self.names) < 2:
            raise SkippedTest(f"the model has one modality: {why}")

    def needs_attention(self, *, keys: bool = True) -> None:
        if self.clean.share is None or (keys and self.clean.cosine is None):
            fusion = getattr(self.model, "fusion", None)
            kind = "the model" if fusion is None or self.clean.missing else type(fusion).__name__
            why = f": {self.clean.missing}" if self.clean.missing else ""
            raise SkippedTest(f"{kind} has no attention over all modalities{why}")

    def needs_parts(self) -> None:
        lacking = [part for part in ("encoders", "encode", "fuse", "loss") if not hasattr(self.model, part)]
        if lacking:
            raise SkippedTest(f"{type(self.model).__name__} is not a FusionModel: it has no {', '.join(lacking)}")


def check_data(names: tuple[str, ...], **options: Any) -> None:
    """Raises ConfigError if an option names a modality that the model does not have."""
    modality = options.pop("modality")
    if modality is not None and modality not in names:
        raise unknown_name("diagnose", "modality", modality, names)
    for option, modalities in options.items():
        for name in modalities or ():
            if name not in names:
                raise unknown_name(f"diagnose {option}", "modality", name, names)


def is_repeatable(loader: Loader | Callable[[], Loader], seed: int, model: nn.Module) -> Callable[[], Loader]:
    """Returns a function that iterates over the batches in the same order on each call.

    It seeds the global RNG, which determines the order of a shuffling DataLoader.

    Raises:
        ConfigError: an iterator, which would be exhausted after the first test.
    """
    if isinstance(loader, Iterator) or not (callable(loader) or isinstance(loader, Iterable)):
        raise ConfigError(
            "diagnose", expected="batches that can be iterated several times: a DataLoader, a list or a function",
            got=f"a {type(loader).__name__}", fix="Pass list(loader), or a function that returns a new loader.",
        )  # fmt: skip

    def again() -> Loader:
        torch.manual_seed(seed)
        yield from named_batches(model, loader() if callable(loader) else loader)

    return again


def outputs_differ(one: Tensor, other: Tensor, task: str | None) -> float:
    """Fraction of samples with different predictions: class, set of labels, or value up to rounding.

    Example:
        >>> one, other = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]])
        >>> outputs_differ(one, other, "classification")
        0.5
    """
    if task == "classification":
        same = one.argmax(dim=-1) == other.argmax(dim=-1)
    elif task == "multilabel":
        same = ((one > 0) == (other > 0)).flatten(1).all(dim=1)
    else:
        same = torch.isclose(one, other, rtol=1e-4, atol=1e-6).flatten(1).all(dim=1)
    return float((~same).float().mean())
