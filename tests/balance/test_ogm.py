"""OGM against its equations: the factor, whole optimizer steps, start and stop, missing samples, errors."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.common.unimodal_terms import discrepancy_ratio, mean_of_others
from equipoise.balance.ogm import modulation
from equipoise.errors import ConfigError
from equipoise.training import method_factory
from equipoise.training.run import load_run_dataset
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.runs import recipe
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_a import mean_scores, ogm

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def build(names=("audio", "image"), *, alpha=0.3, start=0, stop=50, **options):
    model = additive_model(names, **options)
    balancer = eq.balance.OGM(model, alpha=alpha, start=start, stop=stop)
    return model, balancer, eq.BalancerList(model, [balancer])


def expected_factors(model, inputs, alpha, task="classification"):
    """Returns the factors of the oracle for a batch."""
    parts = model.contributions(model(inputs))
    size = len(inputs["target"])
    here = [inputs.get("mask", {}).get(name, torch.ones(size, dtype=torch.bool)).tolist() for name in model.names]
    scores = mean_scores([to_lists(parts[name]) for name in model.names], inputs["target"].tolist(), here, task)
    return dict(zip(model.names, ogm(scores, alpha), strict=True))


def test_worked_example():
    result = modulation(doubles(40, 10), alpha=0.1)
    assert float(result[0]) == pytest.approx(0.62005, abs=5e-6)
    torch.testing.assert_close(result, doubles(1 - torch.tanh(doubles(0.4)).item(), 1), **EXACT)


@quick
@given(st.integers(2, 7), st.floats(1e-3, 1))
def test_equal_scores_apply_no_scaling(number, score):
    assert torch.equal(modulation(doubles(*[score] * number), alpha=0.8), torch.ones(number, dtype=torch.float64))


def test_factor_is_discontinuous_at_ratio_one():
    result = modulation(doubles(1 + 1e-9, 1), alpha=0.3)
    assert float(result[0]) == pytest.approx(1 - 0.2913126, abs=1e-6)
    assert float(result[1]) == 1.0


def test_other_modalities_are_averaged_not_summed():
    torch.testing.assert_close(mean_of_others(doubles(2, 4, 9), torch.ones(3).bool()), doubles(6.5, 5.5, 3), **EXACT)
    # By the sum of the others no ratio would exceed 1 here.
    assert discrepancy_ratio(doubles(3, 2, 2)).tolist() == [1.5, 0.8, 0.8]


def test_small_score_is_not_lost_to_rounding():
    scores = torch.tensor([1.0, 1e-7, 3e-7])
    torch.testing.assert_close(discrepancy_ratio(scores)[0], torch.tensor(5e6), **TOL[torch.float32])


def test_missing_modalities_are_excluded_from_the_comparison():
    assert discrepancy_ratio(doubles(0.6, 0, 0.3)).tolist() == [2.0, 1.0, 0.5]
    assert discrepancy_ratio(doubles(0, 0.3)).tolist() == [1.0, 1.0]
    assert discrepancy_ratio(doubles(0, 0)).tolist() == [1.0, 1.0]


@quick
@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=5), st.floats(0, 2))
def test_formula_equals_the_oracle(scores, alpha):
    result = modulation(doubles(*scores), alpha=alpha).tolist()
    # At a ratio of 1 but for rounding, either side of the jump is right.
    for value, expected, ratio in zip(result, ogm(scores, alpha), discrepancy_ratio(doubles(*scores)), strict=True):
        if abs(float(ratio) - 1) > 1e-12:
            assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert 0 <= value <= 1


@quick
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.floats(0.1, 10))
def test_best_modality_is_scaled_most_and_worst_not_at_all(scores, size):
    result = modulation(doubles(*scores), alpha=0.3)
    assert float(result[scores.index(min(scores))]) == 1.0
    # Equal scores may differ in the last bit.
    assert float(result.min()) == pytest.approx(float(result[scores.index(max(scores))]), rel=1e-14)
    again = modulation(doubles(*scores) * 2**3, alpha=0.3)
    torch.testing.assert_close(again, result, **EXACT)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_step_scales_encoder_matrices_only(number, task, missing):
    names = NAMES[:number]
    model, _, balancing = build(names, task=task)
    inputs = batch_for(task, names, size=7, missing=missing)
    result, plain = step(model, balancing, inputs), step(model, eq.BalancerList(model), inputs)
    factors = expected_factors(model, inputs, 0.3, task)
    assert min(factors.values()) < 1
    for name in names:
        weight = f"encoders.{name}.weight"
        torch.testing.assert_close(result[weight], factors[name] * plain[weight], **EXACT)
    others = [key for key in plain if not (key.startswith("encoders") and key.endswith("weight"))]
    assert {"head.weight", "head.bias", "encoders.audio.bias"} <= set(others)
    assert all(torch.equal(result[key], plain[key]) for key in others)


def test_zero_alpha_applies_no_scaling():
    model, _, balancing = build(alpha=0.0)
    result, plain = step(model, balancing, batch()), step(model, eq.BalancerList(model), batch())
    assert all(torch.equal(result[key], plain[key]) for key in plain)


@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_accumulated_batches_are_scaled_as_one_large_batch(missing):
    model, _, balancing = build(unimodal="none")
    full = batch(size=12, missing=missing)
    large, small = step(model, balancing, full), step(model, balancing, *split_batch(full, 5, 3, 4))
    for key, gradient in large.items():
        torch.testing.assert_close(small[key], gradient, **EXACT)


def test_unimodal_heads_are_used_if_logits_do_not_decompose():
    model = attention_model(unimodal="probe")
    inputs = batch(size=7)
    result, plain = (
        step(model, eq.BalancerList(model, [eq.balance.OGM(model)]), inputs),
        step(model, eq.BalancerList(model), inputs),
    )
    heads = model(inputs).unimodal_logits
    scores = mean_scores([to_lists(heads[name]) for name in model.names], inputs["target"].tolist(), [[True] * 7] * 2)
    for name, factor in zip(model.names, ogm(scores, 0.3), strict=True):
        weight = f"encoders.{name}.weight"
        torch.testing.assert_close(result[weight], factor * plain[weight], **EXACT)


def test_modality_missing_from_all_samples_is_excluded():
    model, _, balancing = build(NAMES[:3])
    inputs = {**batch(NAMES[:3], size=7), "text": None}
    result, plain = step(model, balancing, inputs), step(model, eq.BalancerList(model), inputs)
    pair = {name: parts for name, parts in model.contributions(model(inputs)).items() if name != "text"}
    scores = mean_scores([to_lists(part) for part in pair.values()], inputs["target"].tolist(), [[True] * 7] * 2)
    for name, factor in zip(pair, ogm(scores, 0.3), strict=True):
        weight = f"encoders.{name}.weight"
        torch.testing.assert_close(result[weight], factor * plain[weight], **EXACT)


def test_modulation_is_limited_to_start_and_stop():
    model, balancer, balancing = build(start=1, stop=2)
    plain = step(model, eq.BalancerList(model), batch())["encoders.audio.weight"]
    image = step(model, eq.BalancerList(model), batch())["encoders.image.weight"]
    scaled = []
    for _ in range(3):
        result = step(model, balancing, batch())
        scaled.append(not torch.equal(result["encoders.audio.weight"], plain)
                      or not torch.equal(result["encoders.image.weight"], image))  # fmt: skip
        balancing.end_epoch()
    assert scaled == [False, True, False]
    assert int(balancer.epoch) == 3


def test_log_contains_the_mean_factor():
    model, _, balancing = build()
    factors = []
    for seed in range(3):
        step(model, balancing, batch(seed=seed))
        factors.append(expected_factors(model, batch(seed=seed), 0.3))
    expected = {f"scale/{name}": sum(f[name] for f in factors) / 3 for name in model.names}
    assert balancing.end_epoch() == pytest.approx(expected)
    assert balancing.end_epoch() == {"scale/audio": 1.0, "scale/image": 1.0}


@pytest.mark.parametrize("fusion", [eq.fusion.Concat, eq.fusion.Sum])
def test_after_autocast(fusion):
    """Under autocast features are half precision, the head's weights are not."""
    model, _, balancing = build(fusion=fusion(DIM), dtype=torch.float32)
    inputs = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = balancing.loss(model(inputs), inputs["target"])
    loss.backward()
    gradients = {name: model.encoders[name].weight.grad.clone() for name in model.names}
    balancing.before_step()
    for name, factor in expected_factors(model, inputs, 0.3).items():
        expected = factor * gradients[name]
        torch.testing.assert_close(model.encoders[name].weight.grad, expected, **TOL[torch.bfloat16])


def test_adam_warns_and_sgd_does_not():
    model, _, balancing = build()
    with pytest.warns(UserWarning, match="OGM only changes the scale of gradients, which AdamW normalizes"):
        balancing.check_optimizer(torch.optim.AdamW(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancing.check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"OGM: expected alpha >= 0 and 0 <= start <= stop, got alpha = -0\.1, start = 0, stop = 50"),
        ({"alpha": float("nan")}, "got alpha = nan"),
        ({"start": -1}, "got alpha = 0.3, start = -1"),
        ({"start": 7, "stop": 5}, "start = 7, stop = 5"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        eq.balance.OGM(additive_model(), **options)


def test_model_without_unimodal_logits_raises():
    with pytest.raises(ConfigError, match="OGM: expected two or more modalities, got audio"):
        eq.balance.OGM(additive_model(("audio",)))
    model = attention_model(unimodal="none")
    with pytest.raises(ConfigError, match="OGM: expected logits that are a sum over modalities, or unimodal heads"):
        step(model, eq.BalancerList(model, [eq.balance.OGM(model)]), batch())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (eq.balance.MMPareto, "OGM with MMPareto: it overwrites the encoders' gradients"),
        (eq.balance.AGM, "OGM with AGM: both scale the encoders"),
        (eq.balance.OGM_GE, "OGM_GE with OGM: OGM-GE includes it"),
    ],
)
def test_incompatible_balancers_raise(other, message):
    model = additive_model()
    with pytest.raises(ConfigError, match=message):
        eq.BalancerList(model, [eq.balance.OGM(model), other(model)])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ogm", eq.balance.OGM), ("ogm_ge", eq.balance.OGM_GE), ("agm", eq.balance.AGM),
        ("opm", eq.balance.OPM), ("modality_dropout", eq.balance.ModalityDropout),
        ("mmcosine", eq.balance.MMCosine), ("mbsd", eq.balance.MBSD),
    ],
)  # fmt: skip
def test_names_in_recipes(name, kind):
    config = recipe()
    _, (balancer,) = method_factory.build_model(
        method_factory.parse_method(f"concat+{name}", config), config, load_run_dataset(config, None)
    )
    assert type(balancer) is kind
