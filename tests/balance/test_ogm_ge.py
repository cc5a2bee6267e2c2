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
    made = additive_model(names, dtype=dtype)
    balancer = eq.balance.OGM_GE(made, **options)
    return made, balancer, eq.BalancerList(made, [balancer])


def added_noise(made, balancing, inputs, factors=None):
    """What one step adds to the encoders' matrices beyond their scaled gradients."""
    plain = step(made, eq.BalancerList(made), inputs)
    found = step(made, balancing, inputs)
    keys = [f"encoders.{name}.weight" for name in made.names]
    return [found[key] - (factors or {}).get(key, 1.0) * plain[key] for key in keys]


def ogm_factors(made, alpha, inputs):
    """What OGM alone does to each encoder's matrix, read off one element."""
    plain = step(made, eq.BalancerList(made), inputs)
    found = step(made, eq.BalancerList(made, [eq.balance.OGM(made, alpha=alpha)]), inputs)
    keys = [f"encoders.{name}.weight" for name in made.names]
    return {key: float(found[key][0, 0] / plain[key][0, 0]) for key in keys}


def test_scale_by_hand():
    # Squared distances from 4: 9, 1, 1, 9; over n - 1 = 3.
    gradient = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=torch.float64)
    assert float(noise_scale(gradient)) == pytest.approx(math.sqrt(20 / 3) + 1e-8, abs=1e-12)
    assert float(noise_scale(torch.full((2, 3), 0.7))) == pytest.approx(1e-8)
    assert float(noise_scale(torch.tensor([[5.0]]))) == pytest.approx(1e-8)


def test_noise_has_zero_mean_and_gradient_std():
    made, _, balancing = build(alpha=0.0)
    plain = step(made, eq.BalancerList(made), batch())
    drawn = [added_noise(made, balancing, batch()) for _ in range(200)]
    for name, found in zip(made.names, zip(*drawn, strict=True), strict=True):
        whole, scale = torch.stack(found), float(noise_scale(plain[f"encoders.{name}.weight"]))
        error = scale / math.sqrt(whole.numel())
        assert abs(float(whole.mean())) < 4 * error
        assert float(whole.std()) == pytest.approx(scale, abs=4 * error)


def test_noise_std_is_that_of_the_unscaled_gradient():
    found = []
    for alpha in (0.0, 1.5):
        made, _, balancing = build(alpha=alpha)
        factors = ogm_factors(made, alpha, batch())
        assert (min(factors.values()) < 0.5) is (alpha > 0)
        found.append(added_noise(made, balancing, batch(), factors))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("number", [2, 3])
def test_noise_is_added_to_encoders_only(number):
    made, _, balancing = build(NAMES[:number])
    found, plain = (
        step(made, balancing, batch(NAMES[:number])),
        step(made, eq.BalancerList(made), batch(NAMES[:number])),
    )
    changed = {key for key in plain if not torch.equal(found[key], plain[key])}
    assert changed == {f"encoders.{name}.weight" for name in made.names}


def test_noise_differs_between_modalities_and_steps():
    made, _, balancing = build(alpha=0.0)
    first, second = added_noise(made, balancing, batch()), added_noise(made, balancing, batch())
    scaled = [part.flatten()[:30] / part.std() for part in (*first, *second)]
    for place, one in enumerate(scaled):
        for other in scaled[place + 1 :]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.6


def test_noise_depends_on_seed_only():
    state, found = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        made, _, balancing = build(seed=seed)
        torch.set_rng_state(state)
        found.append(step(made, balancing, batch())["encoders.audio.weight"])
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_resumed_run_draws_the_same_noise():
    made, balancer, balancing = build()
    step(made, balancing, batch())
    saved = copy.deepcopy(balancer.state_dict())
    straight = step(made, balancing, batch(seed=1))
    made, balancer, balancing = build()
    balancer.load_state_dict(saved)
    resumed = step(made, balancing, batch(seed=1))
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_no_noise_outside_start_and_stop():
    made, _, balancing = build(start=1)
    plain = step(made, eq.BalancerList(made), batch())
    found = step(made, balancing, batch())
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    balancing.end_epoch()
    found = step(made, balancing, batch())
    assert not torch.equal(found["encoders.audio.weight"], plain["encoders.audio.weight"])


def test_encoder_without_gradient_gets_no_noise():
    made, _, balancing = build(NAMES[:3])
    made.encoders["image"].requires_grad_(False)
    found = step(made, balancing, {**batch(NAMES[:3]), "text": None})
    assert not [key for key in found if key.startswith(("encoders.image", "encoders.text"))]
    assert bool(found["encoders.audio.weight"].isfinite().all())


def test_no_warning_with_adam():
    made, _, balancing = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancing.check_optimizer(torch.optim.AdamW(made.parameters()))


def test_errors():
    with pytest.raises(ConfigError, match="OGM_GE: expected two or more modalities, got audio"):
        eq.balance.OGM_GE(additive_model(("audio",)))
    with pytest.raises(ConfigError, match="OGM_GE: expected alpha >= 0 and 0 <= start <= stop, got alpha = -1"):
        eq.balance.OGM_GE(additive_model(), alpha=-1)
