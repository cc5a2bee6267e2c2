"""Pearson's r, its p, and the response of attention to noise, against loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from equipoise.diagnostics.noise_test import (
    input_statistics,
    most_attended,
    noise_response,
    pearson,
    response_from_shares,
)
from equipoise.diagnostics.prediction_collection import (
    CollectedPredictions,
    NoiseSource,
    collect_predictions,
    sample_statistics,
    valid_of,
)
from equipoise.errors import ConfigError, ShapeError
from helpers.fusion import batch, joint_model
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]


def slow_pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    both = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    alone = [sum((a - mean) ** 2 for a in values) for values, mean in ((x, mean_x), (y, mean_y))]
    return both / math.sqrt(alone[0] * alone[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 31), st.integers(0, 1000))
def test_r_and_p(size, seed):
    x, y = np.random.default_rng(seed).normal(size=(2, size))
    r, p = pearson(torch.from_numpy(x), torch.from_numpy(y))
    assert r == pytest.approx(slow_pearson(x.tolist(), y.tolist()), rel=EXACT["rtol"], abs=EXACT["atol"])
    assert p == pytest.approx(stats.pearsonr(x, y).pvalue, rel=1e-7)
    assert pearson(torch.from_numpy(y), torch.from_numpy(-x))[0] == pytest.approx(-r)


def test_hand_computed_values():
    r, p = pearson(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 2.0]))
    assert r == pytest.approx(1 / math.sqrt(2))
    assert p == pytest.approx(1 - 1 / math.sqrt(2))  # two degrees of freedom: p = 1 - |r|
    assert pearson(torch.arange(5.0), -torch.arange(5.0)) == pytest.approx((-1.0, 0.0))


@pytest.mark.parametrize(
    "values", [[0.7] * 4, [0.3333333, 0.3333333, 0.3333334, 0.3333333], [0.1, float("nan"), 0.2, 0.3]]
)
def test_undefined_correlation(values):
    x = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert all(math.isnan(part) for part in pearson(x, torch.tensor(values)))
    assert all(math.isnan(part) for part in pearson(x[:2], torch.tensor([0.1, 0.2])))


def test_response_against_loops_for_three_modalities():
    random = torch.Generator().manual_seed(0)
    share = torch.rand(2, 7, 2, 4, generator=random, dtype=torch.float64).softmax(dim=-1)[..., :3]
    clean, noisy = (
        CollectedPredictions(torch.zeros(7, 2), torch.zeros(7), ("a", "b", "c"), share=part) for part in share
    )
    answer = response_from_shares(clean, noisy, "b")
    z, others, own = [], [], []
    for replaced, part in enumerate(share.tolist()):
        for sample in part:
            z.append(float(replaced))
            others.append(sum(head[0] + head[2] for head in sample) / len(sample))
            own.append(sum(head[1] for head in sample) / len(sample))
    assert answer.r == pytest.approx(slow_pearson(z, others))
    assert answer.r_same == pytest.approx(slow_pearson(z, own))
    assert answer.p == pytest.approx(stats.pearsonr(z, others).pvalue)
    torch.testing.assert_close(
        torch.cat([answer.clean, answer.noise]), torch.tensor(others, dtype=torch.float64), **EXACT
    )


@pytest.mark.parametrize("names", [("audio", "image"), ("audio", "image", "text")])
def test_on_a_model(names):
    model = joint_model(names)
    batches = [batch(names, seed=seed) for seed in range(3)]
    answer = noise_response(model, batches, modality="image", noise={"image": (0.5, 2.0)}, seed=3)
    assert -1 <= answer.r <= 1
    assert answer.r != 0
    changed = []
    for number, inputs in enumerate(batches):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + number)
        shape = inputs["image"].shape
        changed.append({**inputs, "image": (torch.randn(shape, generator=generator) * 2 + 0.5).double()})
    model.eval()
    share = torch.cat([model(inputs).share for inputs in changed]).mean(dim=1)
    rest = [index for index, name in enumerate(names) if name != "image"]
    torch.testing.assert_close(answer.noise, share[:, rest].sum(dim=1).float(), **TOL[torch.float32])
    assert noise_response(model, lambda: batches).modality == most_attended(collect_predictions(model, batches))


def test_per_sample_noise_level():
    """A loop over samples: the mean and deviation of the values that a mask leaves, NaN under it left alone."""
    model, inputs = joint_model(), batch(size=6)
    inputs["audio"] = inputs["audio"] * torch.arange(1.0, 7.0).double()[:, None, None] + 3
    token = torch.ones(6, 7, dtype=torch.bool)
    token[1, 4:], token[2, :] = False, False
    inputs["mask"] = {"audio": token}
    inputs["audio"][1, 4:] = torch.nan
    result = noise_response(model, [inputs], modality="audio", seed=3)
    drawn = torch.randn(6, 7, 3, generator=torch.Generator().manual_seed(3 * 1_000_003)).double()
    replaced = inputs["audio"].clone()
    for i in range(6):
        own = inputs["audio"][i][token[i]]
        if len(own):
            deviation = math.sqrt(sum((float(x) - float(own.mean())) ** 2 for x in own.flatten()) / own.numel())
            replaced[i] = drawn[i] * deviation + own.mean()
    model.eval()
    share = model({**inputs, "audio": replaced}).share.mean(dim=1)[:, 1]
    # The sample without audio is left out.
    torch.testing.assert_close(result.noise, share[[0, 1, 3, 4, 5]].float(), **TOL[torch.float32])
    assert len(result.clean) == 5
    mean, std = input_statistics([inputs], "audio", who="test")
    valid = inputs["audio"][token]
    assert (mean, std) == pytest.approx((float(valid.mean()), float(valid.std(correction=0))))


def test_sample_masks_and_encoder_token_masks():
    values = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
    for mask in (torch.tensor([True, False]), torch.tensor([[True, False, True], [False, False, False]])):
        valid = valid_of({"mask": {"audio": mask}}, "audio", values)
        assert valid.tolist() == [[True], [False]]
        assert [part[:, 0].tolist() for part in sample_statistics(values, valid)] == [[2.0, 0.0], [1.0, 0.0]]
    assert valid_of({}, "audio", values).all()


def test_samples_without_the_modality_are_excluded():
    model, inputs = joint_model(), batch(size=7, missing=("audio",))
    has = inputs["mask"]["audio"]
    kept = {name: values[has] for name, values in inputs.items() if name != "mask"}
    result, alone = (
        noise_response(model, [part], modality="audio", noise={"audio": (9.0, 0.0)}) for part in (inputs, kept)
    )
    assert len(result.clean) == int(has.sum()) < 7
    assert result.r == pytest.approx(alone.r)


def test_sign_can_depend_on_the_level():
    """Noise of another level moves attention this way or that way, noise of the own level less."""
    model = joint_model(names=("audio", "image"), heads=1)
    batches = [batch(seed=seed, size=50) for seed in range(2)]
    own = noise_response(model, batches, modality="audio").r
    loud, quiet = (noise_response(model, batches, modality="audio", noise={"audio": (m, 1.0)}).r for m in (6.0, -6.0))
    assert loud * quiet < 0
    assert abs(own) < min(abs(loud), abs(quiet))


def test_constant_attention_has_no_response():
    model = joint_model(depth=1)
    with torch.no_grad():
        model.fusion.attention.query.weight.zero_()
        model.fusion.attention.query.bias.zero_()
    with pytest.warns(UserWarning, match="attention to modalities other than 'audio' is constant; r is NaN"):
        assert math.isnan(noise_response(model, [batch()], modality="audio").r)


def test_errors():
    import equipoise as eq

    model = joint_model()
    static = eq.FusionModel(
        {"audio": torch.nn.Linear(3, 12), "image": torch.nn.Linear(5, 12)}, eq.fusion.Concat(12), 3
    ).double()
    for options in ({}, {"modality": "audio"}):
        with pytest.raises(ConfigError, match=r"noise_response: expected a model with attention.*got a static fusion"):
            noise_response(static, [batch()], **options)
    with pytest.raises(ConfigError, match=r"expected a known modality, got 'imag'. Did you mean 'image'"):
        noise_response(model, [batch()], modality="imag")
    with pytest.raises(ConfigError, match="expected a known entry of noise, got 'image'"):
        noise_response(model, [batch()], modality="image", noise={"audio": (0.0, 1.0)})
    with pytest.raises(ConfigError, match=r"expected noise = 'sample', or a dict: .*, got 'train'\. For the training"):
        noise_response(model, [batch()], modality="image", noise="train")
    with pytest.raises(ConfigError, match="read: expected a known modality"):
        collect_predictions(model, [batch()], noise=NoiseSource("imag"))
    with pytest.raises(ShapeError, match=r"at least one batch, got none. Is the split empty, or the loader used up"):
        noise_response(model, iter([batch()]), modality="audio")


def test_target_is_not_required():
    model, batches = joint_model(), [batch(seed=seed) for seed in range(3)]
    without = [{name: value for name, value in inputs.items() if name != "target"} for inputs in batches]
    assert noise_response(model, without).r == noise_response(model, batches).r
    assert collect_predictions(model, without).target.shape == (0,)
    assert torch.equal(collect_predictions(model, batches).target, torch.cat([inputs["target"] for inputs in batches]))
    with pytest.raises(
        ShapeError, match="read: expected a target in every batch or in none, got one in 2 of 3 batches"
    ):
        collect_predictions(model, [*batches[:2], without[2]])


def test_batches_without_the_modality_are_unchanged():
    model = joint_model()
    lacking = [batch(), {**batch(), "image": None}]
    assert collect_predictions(model, lacking).share[5:, :, 1].abs().max() == 0
    assert collect_predictions(model, lacking, noise=NoiseSource("audio")).cosine.isnan().any(dim=1)[:, 1].sum() == 5
    message = (
        "read 'image': expected a floating tensor or word ids in every batch.*, got NoneType. "
        "Leave out batches that lack"
    )
    with pytest.raises(ShapeError, match=message):
        collect_predictions(model, lacking, noise=NoiseSource("image"))
    with pytest.raises(ShapeError, match=message.replace("read", "noise_response")):
        noise_response(model, lacking, modality="image")
    with pytest.raises(ShapeError, match=r"read 'image': .* got torch\.int64"):
        collect_predictions(model, [{**batch(), "image": torch.zeros(5, 5, 5).long()}], noise=NoiseSource("image"))


class UnnamedModel(torch.nn.Linear):
    def forward(self, batch):
        return super().forward(batch["audio"])


def test_unsupported_models_raise():
    model = joint_model()
    with pytest.raises(ShapeError, match=r"read: expected batches that are dicts: .* got tuple\. Wrap the loader"):
        collect_predictions(model, [tuple(batch().values())])
    with pytest.raises(ShapeError, match=r"noise_response: expected batches that are dicts"):
        input_statistics([[torch.zeros(2, 3)]], "audio", who="noise_response")
    foreign = UnnamedModel(3, 2).double()
    with pytest.raises(
        ConfigError, match=r"read: expected a FusionModel, or .* got UnnamedModel without names\. Set model"
    ):
        noise_response(foreign, [batch()])
    foreign.names = ("audio", "image")
    with pytest.raises(ConfigError, match=r"got UnnamedModel that returns Tensor\. Set .* return equipoise\.Output"):
        collect_predictions(foreign, [batch()])


@pytest.mark.parametrize("fails", [False, True])
def test_model_state_is_restored(fails):
    model = joint_model(dropout=0.5).train()
    model.fusion.eval()
    batches = [batch(), {"audio": torch.zeros(2, 3)} if fails else batch()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.random.get_rng_state()
    if fails:
        with pytest.raises((ShapeError, KeyError)):
            collect_predictions(model, batches, noise=NoiseSource("audio"))
    else:
        collect_predictions(model, batches, noise=NoiseSource("audio"))
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_noise_distributions():
    values = torch.randn(2, 4001, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [5.0]]) + 3
    own = NoiseSource("audio", distribution="per_sample").of(values, 0)
    torch.testing.assert_close(own.std(dim=1), values.std(dim=1), rtol=0.1, atol=0.1)
    standard = NoiseSource("audio", 9.0, 9.0, distribution="standard").of(values, 0)
    assert float(standard.mean().abs()) < 0.1
    assert float(NoiseSource("audio", 9.0, 0.0).of(values, 0).min()) == 9.0
    assert not torch.equal(NoiseSource("audio").of(values, 0), NoiseSource("audio").of(values, 1))
    mean, std = input_statistics([{"audio": values[:1]}, {"audio": values[1:]}], "audio", who="test")
    assert mean == pytest.approx(float(values.double().mean()))
    assert std == pytest.approx(float(values.double().std(correction=0)))


def test_noise_with_per_feature_statistics():
    values = torch.full((2000, 1), 7.0)
    noise = NoiseSource("audio", 3.0, 2.0, distribution="per_sample").of(values, 0)
    std, mean = torch.std_mean(noise)
    assert (float(mean), float(std)) == pytest.approx((3.0, 2.0), abs=0.2)
    pairs = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
    valid = torch.tensor([[True, True], [True, False]])
    drawn = NoiseSource("audio", distribution="standard").of(pairs, 0)
    noise = NoiseSource("audio", 3.0, 2.0, distribution="per_sample").of(pairs, 0, valid)
    torch.testing.assert_close(noise, drawn * torch.tensor([[1.0], [2.0]]) + torch.tensor([[2.0], [3.0]]))
