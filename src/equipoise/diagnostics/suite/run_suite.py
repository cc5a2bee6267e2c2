"""``diagnose``: runs all applicable tests on a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError, EquipoiseError, unknown_name
from ...nn.eval_mode import eval_mode_no_grad
from ...results.bootstrap import settings as bootstrap_settings
from ...results.task_metrics import Metric, find_metric, select_metrics
from .diagnosis_result import Diagnosis
from .diagnostic_context import DiagnosticContext, Loader, SkippedTest, check_data, is_repeatable
from .test_registry import OPTIONAL_TESTS, TESTS

KNOWN_TESTS = {**TESTS, **OPTIONAL_TESTS}

Progress = Callable[[str, int, int], None]
"""Called with the name of a test, the number of finished tests, and the number of tests."""


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
    metric: str | Metric | None = None,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None,
    name: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Runs all applicable diagnostics on a trained model and summarizes which modalities it uses.

    Attention is not evidence of use: modalities are also replaced by noise, masked and corrupted, and the effects on
    score, predictions and attention are reported together. The model is not changed: weights, ``.grad``, training
    modes, hooks and the RNG state are restored.

    Args:
        model: a FusionModel, any other model after ``eq.adapt``, or a module with ``names`` that returns Output, to
            which fewer tests apply.
        loader: batches of held-out data, dicts with every modality and ``"target"``, that can be iterated several times
            in the same order; or a function that returns them.
        tests: names of ``TESTS``; all by default. The score is always measured. ``"robustness"`` (scores under all
            corruptions of the catalog) and ``"information"`` (redundancy, uniqueness and synergy) take long and run
            only if they are named.
        noise: name -> (mean, std) of the noise that replaces a modality, such as ``Dataset.noise``; by default those of
            the inputs of the loader.
        outside: out-of-distribution batches for the test of confidence.
        modality: modality that is replaced by noise for the response of attention; by default the most attended one.
            Select it on validation data.
        alone: name -> score of a unimodal model on the same samples; or, for a paired test, the outcome of each sample
            in the order of the loader: 1 for a correct class and 0 for a wrong one, the fraction of correct labels, or
            the negative absolute error, NaN for a sample without the modality. By default the unimodal heads of the
            model are used, if it has any.
        tokens: modality -> names of its tokens, for the consistency test.
        metric: name of the metric that replaces the score of the task in every test and verdict, such as
            ``"f1_macro"``, ``"auroc"`` or ``"concordance"``: see ``equipoise.results.task_metrics.METRICS``; or one of
            ``metrics``. By default accuracy, or the mean absolute error of a regression.
        metrics: name -> function of your own, (predictions, targets) -> number, larger values are better. Predictions
            are probabilities of (sample, class) or (sample, label), or values of (sample, output). Each is measured on
            clean input and under noise; the first is the ``metric`` if none is given.
        name: of the model; by default that of its fusion.
        seed: of all noise.
        progress: called before each test, and at the end.

    Returns:
        Diagnosis. ``skipped`` lists the tests that do not apply or failed, with the reason.

    Raises:
        ConfigError: an unknown test, modality or metric, batches that can be iterated only once, or a module without
            ``names``.
        ShapeError: an empty loader, or batches that do not fit the model. NonFiniteError: a prediction is NaN.

    Reference: RollingQ (ICML 2025), section 4.
    """
    from ...report.verdict_list import verdicts

    chosen = _chosen(tests)
    names = tuple(getattr(model, "names", ()))
    if names:
        check_data(names, modality=modality, noise=noise, alone=alone, tokens=tokens)
    chosen_metric, others = _chosen_metrics(model, metric, metrics)
    context = DiagnosticContext(
        model, is_repeatable(loader, seed, model), noise or {}, outside, modality, seed, alone or {}, tokens or {},
        chosen_metric, others,
    )  # fmt: skip
    measured: dict[str, float] = {}
    details: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with eval_mode_no_grad(model):
        context.run_clean_pass()
        for done, test in enumerate(chosen):
            if progress is not None:
                progress(test, done, len(chosen))
            try:
                result = KNOWN_TESTS[test](context)
            except SkippedTest as reason:
                skipped[test] = str(reason)
                continue
            except EquipoiseError as error:
                # The score is required; failures of other tests are reported as skipped.
                if test == "score":
                    raise
                skipped[test] = str(error)
                continue
            measured |= result.metrics
            details[test] = result.details
    if progress is not None:
        progress("", len(chosen), len(chosen))
    protocol: dict[str, Any] = {
        "tests": list(chosen), "noise_seed": seed, "noise": {k: list(v) for k, v in (noise or {}).items()}
    }  # fmt: skip
    if chosen_metric is not None:
        protocol |= {"score": chosen_metric.name, "metrics": [m.name for m in (chosen_metric, *others)]}
        protocol["bootstrap"] = bootstrap_settings(context.samples)
    content = {
        "names": context.names,
        "task": context.task,
        "samples": context.samples,
        "metrics": measured,
        "details": details,
        "protocol": protocol,
    }
    return Diagnosis(
        name=name or _default_name(model),
        names=context.names,
        task=context.task,
        samples=context.samples,
        metrics=measured,
        verdicts=tuple(verdicts(content)),
        details=details,
        skipped=skipped,
        protocol=protocol,
    )


def _chosen(tests: Sequence[str] | None) -> list[str]:
    """The selected tests in their order, including the score."""
    if isinstance(tests, str):
        raise ConfigError("diagnose", expected="a list of tests", got=repr(tests), fix=f"Pass [{tests!r}].")
    for test in tests or ():
        if test not in KNOWN_TESTS:
            raise unknown_name("diagnose", "test", str(test), KNOWN_TESTS)
    return [test for test in KNOWN_TESTS if test == "score" or (test in TESTS if tests is None else test in tests)]


def _chosen_metrics(
    model: nn.Module, metric: str | Metric | None, user_metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None
) -> tuple[Metric | None, list[Metric]]:
    """The main metric, None for the score of the task, and the others."""
    task = getattr(model, "task", None)
    mine = {metric.name: metric for metric in select_metrics((), task, "diagnose", user_metrics)}
    if isinstance(metric, str) and metric in mine:
        main = mine[metric]
    else:
        main = find_metric(metric, task, "diagnose") if metric is not None else next(iter(mine.values()), None)
    return main, [metric for metric in mine.values() if metric is not main]


def _default_name(model: nn.Module) -> str:
    """Default name of a model: that of its fusion."""
    cls = getattr(model, "adapted_class", None) or type(getattr(model, "fusion", model))
    return vars(cls).get("name", cls.__name__.lower())
