"""What the tests of one diagnosis share: the batches, the noise, and the passes that several of them read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, unknown_name
from ...recording import AttentionRecord, watch
from ...tokens.token_batch import Output
from ..noise_test import input_statistics, most_attended
from ..prediction_collection import CollectedPredictions, NoiseSource, collect_predictions
from ..task_scores import SCORES, score_name
from .layer_tests import attends, residuals

Loader = Iterable[Mapping[str, Any]]


class SkippedTest(Exception):
    """A test that does not apply to this model, and why."""


@dataclass(eq=False)
class DiagnosticContext:
    """One model before its tests.

    Args:
        model: a FusionModel.
        batches: gives the same batches again and again.
        noise: name -> (mean, std) of the noise; empty for those of the loader's own inputs.
        outside: batches of what the model was never taught, or None.
        modality: the one that noise replaces for the response of attention; None for the one attended most.
        seed: of all noise.
        alone: name -> score of a model of that modality alone, or the outcome of every sample; empty where the model's
            own heads have to do.
        tokens: name -> what each of its tokens is called.
    """

    model: nn.Module
    batches: Callable[[], Loader]
    noise: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    outside: Loader | None = None
    modality: str | None = None
    seed: int = 0
    alone: Mapping[str, float | Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.heads: dict[str, list[Tensor]] = {}
        self.has: dict[str, list[Tensor]] = {}
        self.seen: AttentionRecord | None = None
        self.residuals: dict[str, list[Tensor]] = {}
        self._noisy: dict[str, CollectedPredictions] = {}
        self._statistics: dict[str, tuple[float, float]] = {}

    def look(self) -> None:
        """The pass on the inputs as they are, with everything watched that can be."""
        fusion = getattr(self.model, "fusion", None)
        with warnings.catch_warnings(), ExitStack() as stack:
            # Some fusions have attention over keys that mix modalities (the joint stream of JMT, for example). The test
            # of attention uses the other layers, and is skipped if there are none.
            warnings.filterwarnings("ignore", message="watch: ", category=UserWarning)
            stack.callback(self.model.register_forward_hook(self._keep).remove)
            if fusion is not None and attends(fusion):
                self.seen = stack.enter_context(watch(self.model))
                self.residuals = stack.enter_context(residuals(fusion))
            self.clean = collect_predictions(self.model, self.batches())
        self.names = self.clean.names
        # Models that are not ours may lack the task; then only attention can be looked at.
        self.task = getattr(self.model, "task", None)

    def _keep(self, model: nn.Module, args: tuple, output: Any) -> None:
        """What the unimodal heads say, and which samples have the modality."""
        if isinstance(output, Output):
            for name, logits in output.unimodal_logits.items():
                self.heads.setdefault(name, []).append(logits.detach().float().cpu())
                self.has.setdefault(name, []).append(output.tokens[name].present().cpu())

    @property
    def score(self) -> str:
        """Name of the metric that tells how good the answers are."""
        return SCORES.get(str(self.task), "accuracy")

    @property
    def samples(self) -> int:
        return len(self.clean.logits)

    @property
    def replaced(self) -> str:
        """The modality whose noise attention should notice."""
        return self.modality or most_attended(self.clean)

    def worth(self, logits: Tensor, target: Tensor | None = None) -> float:
        """The score of answers to these samples."""
        return score_name(self.model, logits, self.clean.target if target is None else target, "diagnose")

    def noisy(self, name: str) -> CollectedPredictions:
        """The pass with one modality replaced by noise."""
        if name not in self._noisy:
            noise = NoiseSource(name, *self.statistics(name), seed=self.seed)
            found = self._noisy[name] = collect_predictions(self.model, self.batches(), noise=noise)
            if found.target.shape != self.clean.target.shape or not torch.equal(found.target, self.clean.target):
                raise ConfigError(
                    "diagnose", expected="the same batches in the same order each time", got="other targets",
                    fix="Turn shuffling off: DataLoader(..., shuffle=False).",
                )  # fmt: skip
        return self._noisy[name]

    def noisy_own(self, name: str) -> CollectedPredictions:
        """The pass with one modality replaced by noise of each sample's own mean and standard deviation."""
        return collect_predictions(
            self.model, self.batches(), noise=NoiseSource(name, seed=self.seed, distribution="per_sample")
        )

    def statistics(self, name: str) -> tuple[float, float]:
        """(mean, standard deviation) of the noise in place of a modality."""
        if name in self.noise:
            return self.noise[name]
        if name not in self._statistics:
            self._statistics[name] = input_statistics(self.batches(), name, who="diagnose")
        return self._statistics[name]

    def needs_targets(self) -> None:
        if self.task not in SCORES:
            raise SkippedTest(f"the model has no task, one of {', '.join(SCORES)}, so its answers have no score")
        if not len(self.clean.target):
            raise SkippedTest("the batches have no target")

    def needs_several(self, why: str) -> None:
        if len(self.names) < 2:
            raise SkippedTest(f"the model has one modality: {why}")

    def needs_attention(self) -> None:
        if self.clean.share is None or self.clean.cosine is None:
            fusion = getattr(self.model, "fusion", None)
            kind = "the model" if fusion is None else type(fusion).__name__
            raise SkippedTest(f"{kind} has no attention that reads all modalities out")

    def needs_parts(self) -> None:
        lacking = [part for part in ("encoders", "encode", "fuse", "loss") if not hasattr(self.model, part)]
        if lacking:
            raise SkippedTest(f"{type(self.model).__name__} is no FusionModel: it has no {', '.join(lacking)}")


def check_data(names: tuple[str, ...], **given: Any) -> None:
    """Raises ConfigError where an option names a modality that the model does not have."""
    modality = given.pop("modality")
    if modality is not None and modality not in names:
        raise unknown_name("diagnose", "modality", modality, names)
    for option, named in given.items():
        for name in named or ():
            if name not in names:
                raise unknown_name(f"diagnose {option}", "modality", name, names)


def is_repeatable(loader: Loader | Callable[[], Loader], seed: int) -> Callable[[], Loader]:
    """A function that gives the batches from the start, in the same order, each time it is called.

    It moves the global generator, from which a DataLoader that shuffles takes its order.

    Raises:
        ConfigError: an iterator, which would be empty after the first test.
    """
    if isinstance(loader, Iterator) or not (callable(loader) or isinstance(loader, Iterable)):
        raise ConfigError(
            "diagnose", expected="batches that can be gone through many times: a DataLoader, a list, a function",
            got=f"a {type(loader).__name__}", fix="Give list(loader), or a function that makes a new one.",
        )  # fmt: skip

    def again() -> Loader:
        torch.manual_seed(seed)
        yield from loader() if callable(loader) else loader

    return again


def outputs_differ(one: Tensor, other: Tensor, task: str | None) -> float:
    """Part of the samples whose answer is another one: class, set of labels, or number but for rounding.

    Example:
        >>> different(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]]), "classification")
        0.5
    """
    if task == "classification":
        same = one.argmax(dim=-1) == other.argmax(dim=-1)
    elif task == "multilabel":
        same = ((one > 0) == (other > 0)).flatten(1).all(dim=1)
    else:
        same = torch.isclose(one, other, rtol=1e-4, atol=1e-6).flatten(1).all(dim=1)
    return float((~same).float().mean())
