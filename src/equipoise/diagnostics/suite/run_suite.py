"""``diagnose``: every test that applies to a model, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError, EquipoiseError, unknown_name
from ...nn.eval_mode import eval_mode_no_grad
from .diagnosis_result import Diagnosis
from .diagnostic_context import DiagnosticContext, Loader, SkippedTest, check_data, is_repeatable
from .test_registry import QUESTIONS

Progress = Callable[[str, int, int], None]
"""Called with the name of a test, how many are done, and how many there are."""


def diagnose(
    model: nn.Module,
    loader: Loader | Callable[[], Loader],
    *,
    tests: Sequence[str] | None = None,
    noise: Mapping[str, tuple[float, float]] | None = None,
    outside: Loader | None = None,
    modality: str | None = None,
    alone: Mapping[str, float | Tensor] | None = None,
    tokens: Mapping[str, Sequence[str]] | None = None,
    name: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Puts every question of the library to a trained model, and says in plain words whether it uses what it is given.

    Attention is not proof of use: modalities are replaced by noise, taken away, damaged by degrees, and the score, the
    answers and attention are looked at together. Nothing of the model is changed: weights, ``.grad``, modes, hooks and
    random state are afterward as they were.

    Args:
        model: a FusionModel, or a module with the modalities' names that returns Output; then fewer tests apply.
        loader: batches of held-out data, dicts with every modality and ``"target"``, that can be gone through many
            times in the same order; or a function that gives them.
        tests: names of ``QUESTIONS``; all by default. The score is always measured.
        noise: name -> (mean, std) of the noise in place of a modality, such as ``Dataset.noise``; by default those of
            the loader's own inputs.
        outside: batches of what the model was never taught, for the test of confidence.
        modality: the one that noise replaces when attention is asked whether it leaves; by default the one that is
            attended most, which is better chosen on validation data.
        alone: name -> score of a model of that modality alone on the same samples; or, for a paired test, the outcome
            of every sample in the loader's order: 1 for a right class and 0 for a wrong one, the part of right labels,
            or minus the absolute error, NaN for a sample without the modality. Without it the model's own unimodal
            heads have to do, where it has any.
        tokens: modality -> a name for each of its tokens, for the contradictions of its attention.
        name: what the model is called; by default its fusion's name.
        seed: of all noise.
        progress: called before every test, and at the end.

    Returns:
        Diagnosis. ``skipped`` has the tests that do not apply and those that failed, each with its reason.

    Raises:
        ConfigError: an unknown test or modality, batches that cannot be gone through twice, a module that is no model.
        ShapeError: an empty loader, or batches that the model does not take. NonFiniteError: answers that are NaN.

    Reference: RollingQ (ICML 2025), section 4; spec 8.
    """
    from ...report.verdict_list import verdicts

    chosen = _chosen(tests)
    names = tuple(getattr(model, "names", ()))
    if names:
        check_data(names, modality=modality, noise=noise, alone=alone, tokens=tokens)
    of = DiagnosticContext(
        model, is_repeatable(loader, seed), noise or {}, outside, modality, seed, alone or {}, tokens or {}
    )
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with eval_mode_no_grad(model):
        of.look()
        for done, test in enumerate(chosen):
            if progress is not None:
                progress(test, done, len(chosen))
            try:
                found = QUESTIONS[test](of)
            except SkippedTest as reason:
                skipped[test] = str(reason)
                continue
            except EquipoiseError as error:
                # Without a score there is nothing to diagnose; one of the other tests may fail alone.
                if test == "score":
                    raise
                skipped[test] = str(error)
                continue
            metrics |= found.metrics
            details[test] = found.details
    if progress is not None:
        progress("", len(chosen), len(chosen))
    content = {"names": of.names, "task": of.task, "samples": of.samples, "metrics": metrics, "details": details}
    return Diagnosis(
        name=name or _called(model),
        names=of.names,
        task=of.task,
        samples=of.samples,
        metrics=metrics,
        verdicts=tuple(verdicts(content)),
        details=details,
        skipped=skipped,
        protocol={"tests": list(chosen), "noise_seed": seed, "noise": {k: list(v) for k, v in (noise or {}).items()}},
    )


def _chosen(tests: Sequence[str] | None) -> list[str]:
    """The tests in their order, the score among them."""
    if isinstance(tests, str):
        raise ConfigError("diagnose", expected="a list of tests", got=repr(tests), fix=f"Give [{tests!r}].")
    for test in tests or ():
        if test not in QUESTIONS:
            raise unknown_name("diagnose", "test", str(test), QUESTIONS)
    return [test for test in QUESTIONS if tests is None or test in tests or test == "score"]


def _called(model: nn.Module) -> str:
    """A name for a model that has none: its fusion's."""
    cls = type(getattr(model, "fusion", model))
    return vars(cls).get("name", cls.__name__.lower())
