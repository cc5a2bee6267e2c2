"""OGM-GE against its equations: scale of the noise, affected parameters, repeatability."""

import copy
import math
import warnings

import pytest
import torch

import equipoise as eq
from equipoise.balance.ogm_ge import noise_scale
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch
from helpers.steps import step
from helpers.tasks import additive_model
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]


def build(names=("audio", "image"), *, dtype=torch.float64, **options):
    model = additive_model(names, dtype=dtype)
    balancer = eq.balance.OGM_GE(model, **options)
    return model, balancer, eq.BalancerList(model, [balancer])


def added_noise(model, balancing, inputs, factors=None):
    """What one step adds to the encoders' matrices beyond their scaled gradients."""
    plain = step(model, eq.BalancerList(model), inputs)
    result = step(model, balancing, inputs)
    keys = [f"encoders.{name}.weight" for name in model.names]
    return [result[key] - (factors or {}).get(key, 1.0) * plain[key] for key in keys]


def ogm_factors(model, alpha, inputs):
    """What OGM alone does to each encoder's matrix, read off one element."""
    plain = step(model, eq.BalancerList(model), inputs)
    result = step(model, eq.BalancerList(model, [eq.balance.OGM(model, alpha=alpha)]), inputs)
    keys = [f"encoders.{name}.weight" for name in model.names]
    return {key: float(result[key][0, 0] / plain[key][0, 0]) for key in keys}


def test_scale_by_hand():
    # Squared distances from 4: 9, 1, 1, 9; over n - 1 = 3.
    gradient = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=torch.float64)
    assert float(noise_scale(gradient)) == pytest.approx(math.sqrt(20 / 3) + 1e-8, abs=1e-12)
    assert float(noise_scale(torch.full((2, 3), 0.7))) == pytest.approx(1e-8)
    assert float(noise_scale(torch.tensor([[5.0]]))) == pytest.approx(1e-8)


def test_noise_has_zero_mean_and_gradient_std():
    model, _, balancing = build(alpha=0.0)
    plain = step(model, eq.BalancerList(model), batch())
    drawn = [added_noise(model, balancing, batch()) for _ in range(200)]
    for name, result in zip(model.names, zip(*drawn, strict=True), strict=True):
        full, scale = torch.stack(result), float(noise_scale(plain[f"encoders.{name}.weight"]))
        error = scale / math.sqrt(full.numel())
        assert abs(float(full.mean())) < 4 * error
        assert float(full.std()) == pytest.approx(scale, abs=4 * error)


def test_noise_std_is_that_of_the_unscaled_gradient():
    result = []
    for alpha in (0.0, 1.5):
        model, _, balancing = build(alpha=alpha)
        factors = ogm_factors(model, alpha, batch())
        assert (min(factors.values()) < 0.5) is (alpha > 0)
        result.append(added_noise(model, balancing, batch(), factors))
    for one, other in zip(*result, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("number", [2, 3])
def test_noise_is_added_to_encoders_only(number):
    model, _, balancing = build(NAMES[:number])
    result, plain = (
        step(model, balancing, batch(NAMES[:number])),
        step(model, eq.BalancerList(model), batch(NAMES[:number])),
    )
    changed = {key for key in plain if not torch.equal(result[key], plain[key])}
    assert changed == {f"encoders.{name}.weight" for name in model.names}


def test_noise_differs_between_modalities_and_steps():
    model, _, balancing = build(alpha=0.0)
    first, second = added_noise(model, balancing, batch()), added_noise(model, balancing, batch())
    scaled = [part.flatten()[:30] / part.std() for part in (*first, *second)]
    for index, one in enumerate(scaled):
        for other in scaled[index + 1 :]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.6


def test_noise_depends_on_seed_only():
    state, result = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        model, _, balancing = build(seed=seed)
        torch.set_rng_state(state)
        result.append(step(model, balancing, batch())["encoders.audio.weight"])
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(result[0], result[1])
    assert not torch.allclose(result[0], result[2])


def test_resumed_run_draws_the_same_noise():
    model, balancer, balancing = build()
    step(model, balancing, batch())
    saved = copy.deepcopy(balancer.state_dict())
    straight = step(model, balancing, batch(seed=1))
    model, balancer, balancing = build()
    balancer.load_state_dict(saved)
    resumed = step(model, balancing, batch(seed=1))
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_no_noise_outside_start_and_stop():
    model, _, balancing = build(start=1)
    plain = step(model, eq.BalancerList(model), batch())
    result = step(model, balancing, batch())
    assert all(torch.equal(result[key], plain[key]) for key in plain)
    balancing.end_epoch()
    result = step(model, balancing, batch())
    assert not torch.equal(result["encoders.audio.weight"], plain["encoders.audio.weight"])


def test_encoder_without_gradient_gets_no_noise():
    model, _, balancing = build(NAMES[:3])
    model.encoders["image"].requires_grad_(False)
    result = step(model, balancing, {**batch(NAMES[:3]), "text": None})
    assert not [key for key in result if key.startswith(("encoders.image", "encoders.text"))]
    assert bool(result["encoders.audio.weight"].isfinite().all())


def test_no_warning_with_adam():
    model, _, balancing = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancing.check_optimizer(torch.optim.AdamW(model.parameters()))


def test_errors():
    with pytest.raises(ConfigError, match="OGM_GE: expected two or more modalities, got audio"):
        eq.balance.OGM_GE(additive_model(("audio",)))
    with pytest.raises(ConfigError, match="OGM_GE: expected alpha >= 0 and 0 <= start <= stop, got alpha = -1"):
        eq.balance.OGM_GE(additive_model(), alpha=-1)
