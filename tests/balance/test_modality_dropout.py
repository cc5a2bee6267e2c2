"""Modality dropout against its equations: masks, drop rates, repeatable draws, and when it does nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.common.step_rng import step_generator, uniform_per_sample
from equipoise.balance.modality_dropout import keep_masks
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch, split_batch
from helpers.steps import attention_model, step
from helpers.tasks import additive_model
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def build(names=("audio", "image"), *, make=attention_model, model=(), **options):
    result = make(names, **dict(model))
    balancer = eq.balance.ModalityDropout(result, **options)
    return result.train(), balancer, eq.BalancerList(result, [balancer])


def presence(tokens):
    return torch.stack([part.present() for part in tokens.values()], dim=1)


def test_masks_by_hand():
    present = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    drawn = torch.tensor([[0.1, 0.5], [0.1, 0.2], [0.1, 0.9], [0.9, 0.9]])
    result = keep_masks(present, torch.tensor([0.5, 0.5]), drawn)
    assert result.tolist() == [[False, True], [True, True], [True, False], [False, False]]


@quick
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_missing_modalities_stay_missing_and_every_sample_keeps_one(seed, rates):
    random = torch.Generator().manual_seed(seed)
    present, drawn = torch.rand(11, 3, generator=random) < 0.7, torch.rand(11, 3, generator=random)
    result = keep_masks(present, torch.tensor(rates), drawn).tolist()
    for has, keeps, numbers in zip(present.tolist(), result, drawn.tolist(), strict=True):
        expected = [yes and u >= p for yes, u, p in zip(has, numbers, torch.tensor(rates).tolist(), strict=True)]
        assert keeps == (expected if any(expected) else has)


def test_measured_rates_match_the_options():
    model, balancer, _ = build(NAMES[:3], p={"audio": 0.3, "image": 0.6})
    result = presence(balancer.transform(model.encode(batch(NAMES[:3], size=20011)))).double().mean(dim=0).tolist()
    # The text is never dropped, so that no sample is emptied.
    assert result == pytest.approx([0.7, 0.4, 1.0], abs=0.015)


def test_single_rate_for_all_modalities():
    model, balancer, _ = build(p=0.5)
    result = presence(balancer.transform(model.encode(batch(size=20011))))
    # Of four equal cases the empty one is whole again.
    assert result.double().mean(dim=0).tolist() == pytest.approx([0.75, 0.75], abs=0.015)
    assert bool(result.any(dim=1).all())


@pytest.mark.parametrize("make", [attention_model, additive_model])
def test_dropped_modality_equals_missing_modality(make):
    model, balancer, _ = build(make=make, p={"audio": 1.0})
    inputs = batch(size=7, missing=("image",))
    output = model(inputs)
    # Those without image keep their audio.
    here = {"audio": ~inputs["mask"]["image"], "image": inputs["mask"]["image"]}
    balancer.rates = {"audio": 0.0, "image": 0.0}
    torch.testing.assert_close(output.logits, model({**inputs, "mask": here}).logits, **EXACT)
    assert torch.equal(presence(output.tokens), torch.stack([here["audio"], here["image"]], dim=1))


def test_encoder_is_trained_by_retained_samples_only():
    model, _, balancing = build(p={"audio": 1.0})
    result = step(model, balancing, batch())
    assert not bool(result["encoders.audio.weight"].any())
    assert bool(result["encoders.image.weight"].any())


@pytest.mark.parametrize("p", [0, 0.0, {}])
def test_zero_rate_is_the_identity(p):
    model, balancer, _ = build(p=p)
    tokens = model.encode(batch())
    assert balancer.transform(tokens) is tokens


def test_evaluation_drops_nothing():
    model, _, _ = build(p=0.9)
    assert bool(presence(model.eval()(batch(size=31)).tokens).all())
    assert not bool(presence(model.train()(batch(size=31)).tokens).all())


def test_accumulated_batches_equal_one_large_batch():
    full, result = batch(size=12), []
    for sizes in ((12,), (5, 3, 4)):
        model, _, balancing = build(p=0.4, model={"unimodal": "none"})
        result.append([step(model, balancing, *split_batch(full, *sizes)) for _ in range(2)])
    for one, other in zip(*result, strict=True):
        for key, gradient in one.items():
            torch.testing.assert_close(other[key], gradient, **EXACT)
    assert not torch.allclose(result[0][0]["encoders.audio.weight"], result[0][1]["encoders.audio.weight"])


@quick
@given(st.lists(st.integers(1, 13), min_size=1, max_size=4), st.integers(0, 10**6))
def test_micro_batches_draw_the_masks_of_the_full_batch(sizes, seed):
    full = uniform_per_sample(step_generator(seed, 3), 0, sum(sizes), 3)
    parts = [uniform_per_sample(step_generator(seed, 3), sum(sizes[:n]), size, 3) for n, size in enumerate(sizes)]
    assert torch.equal(torch.cat(parts), full)


def test_randomness_depends_on_seed_and_step_only():
    tokens = additive_model().encode(batch(size=101))
    state, result = torch.get_rng_state(), {}
    for seed, steps in ((0, 0), (0, 1), (1, 0), (0, 0)):
        _, balancer, _ = build(p=0.5, seed=seed)
        balancer.steps += steps
        torch.set_rng_state(state)
        masks = presence(balancer.transform(tokens))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(masks, result.setdefault((seed, steps), masks))
    assert not torch.equal(result[0, 0], result[0, 1])
    assert not torch.equal(result[0, 0], result[1, 0])


def test_resumed_run_draws_the_same_masks():
    model, balancer, balancing = build(p=0.5)
    step(model, balancing, batch())
    saved = copy.deepcopy(balancer.state_dict())
    straight = step(model, balancing, batch(seed=1))
    model, balancer, balancing = build(p=0.5)
    balancer.load_state_dict(saved)
    resumed = step(model, balancing, batch(seed=1))
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (1.5, r"ModalityDropout: expected 0 <= p <= 1, got p = 1\.5 for 'audio'"),
        (-0.1, r"got p = -0\.1 for 'audio'"),
        ({"image": float("nan")}, "got p = nan for 'image'"),
        ("0.5", "got p = '0.5' for 'audio'"),
        ({"imge": 0.5}, "ModalityDropout: expected a known modality, got 'imge'. Did you mean 'image'"),
    ],
)
def test_invalid_options_raise(p, message):
    with pytest.raises(ConfigError, match=message):
        eq.balance.ModalityDropout(additive_model(), p=p)


def test_single_modality_raises():
    with pytest.raises(ConfigError, match="ModalityDropout: expected two or more modalities, got audio"):
        eq.balance.ModalityDropout(additive_model(("audio",)))
