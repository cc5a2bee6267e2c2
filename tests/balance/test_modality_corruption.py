"""ModalityCorruption: corrupted inputs, the attention loss and ensembles, against loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.modality_corruption import attention_target_loss, smooth_noise
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch, joint_model
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
SIZE = 503


def corrupt(model, balancer, inputs):
    return balancer.prepare({name: inputs[name] for name in model.names})


def destroyed_mask(balancer):
    """Which modalities of which samples the last ``prepare`` destroyed."""
    return balancer.kept("destroyed", eq.Output(features=torch.zeros(0, 1)))


def oracle(share, intact):
    """Sample by sample, head by head."""
    losses = []
    for each, full in zip(share.tolist(), intact.tolist(), strict=True):
        if not any(full):
            continue
        heads = []
        for row in each:
            total = sum(row)
            heads.append(-sum(math.log(s / total) / sum(full) for s, w in zip(row, full, strict=True) if w))
        losses.append(sum(heads) / len(heads))
    return sum(losses) / len(losses)


def test_attention_target_loss_against_a_loop():
    random = torch.Generator().manual_seed(0)
    share = torch.rand(11, 2, 3, generator=random, dtype=torch.float64) * 0.3
    intact = torch.rand(11, 3, generator=random) < 0.6
    intact[4] = False
    assert float(attention_target_loss(share, intact)) == pytest.approx(oracle(share, intact), abs=EXACT["atol"])


@given(st.integers(2, 5), st.integers(0, 10_000))
def test_loss_is_minimal_for_uniform_shares_of_intact_modalities(count, seed):
    random = torch.Generator().manual_seed(seed)
    intact = torch.rand(1, count, generator=random) < 0.5
    intact[0, 0] = True
    even = (intact / intact.sum())[:, None].double()
    other = torch.rand(1, 1, count, generator=random, dtype=torch.float64) + 1e-3
    assert float(attention_target_loss(even, intact)) == pytest.approx(math.log(int(intact.sum())), abs=1e-6)
    assert float(attention_target_loss(other, intact)) >= float(attention_target_loss(even, intact)) - 1e-9


def test_gradient_of_the_attention_target_loss():
    share = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    intact = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    assert torch.autograd.gradcheck(lambda s: attention_target_loss(s, intact), share.requires_grad_())


@pytest.mark.parametrize("scale", [0, 1, 3, 6])
def test_noise_of_every_scale_has_unit_size_and_its_own_smoothness(scale):
    noise = smooth_noise((200, 16, 24), scale, torch.Generator().manual_seed(0))
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)
    step = float((noise[:, :, 1:] - noise[:, :, :-1]).std())
    assert {0: step > 1.3, 1: step < 1.0, 3: step < 0.4, 6: step < 1e-6}[scale]
    assert smooth_noise((5, 3), 2, torch.Generator().manual_seed(0)).shape == (5, 3)


def test_rates_of_corruption_and_replacement():
    model = joint_model(dtype=torch.float64)
    inputs = batch(size=SIZE)
    balancer = eq.balance.ModalityCorruption(model, probability=0.4, replace_prob=0.5)
    result = corrupt(model, balancer, inputs)
    changed = torch.stack([(result[n] != inputs[n]).flatten(1).any(dim=1) for n in model.names], dim=1)
    # Of two modalities one is spared where both are hit: 0.4 - 0.4^2 / 2.
    assert changed.double().mean() == pytest.approx(0.32, abs=0.05)
    assert not changed.all(dim=1).any()
    assert destroyed_mask(balancer).double().mean() == pytest.approx(0.16, abs=0.04)
    assert (destroyed_mask(balancer) <= changed).all()
    # Destroyed inputs tell nothing of what they were; mixed ones do.
    for index, name in enumerate(model.names):
        was, now = inputs[name].flatten(1), result[name].flatten(1)
        gone = destroyed_mask(balancer)[:, index]
        mixed = changed[:, index] & ~gone
        assert abs(float(torch.corrcoef(torch.stack([was[gone].flatten(), now[gone].flatten()]))[0, 1])) < 0.15
        assert float(torch.corrcoef(torch.stack([was[mixed].flatten(), now[mixed].flatten()]))[0, 1]) > 0.5
        torch.testing.assert_close(now[~changed[:, index]], was[~changed[:, index]], rtol=0, atol=0)


def test_input_batch_is_not_modified_and_evaluation_is_not_corrupted():
    model = joint_model(dtype=torch.float64)
    balancing = eq.BalancerList(model, [eq.balance.ModalityCorruption(model, probability=1.0)])
    inputs = batch()
    kept = {name: value.clone() for name, value in inputs.items()}
    trained = model.train()(inputs).logits
    assert all(torch.equal(kept[name], inputs[name]) for name in kept)
    twin = joint_model(dtype=torch.float64)
    assert not torch.equal(trained, twin.train()(inputs).logits)
    assert torch.equal(model.eval()(inputs).logits, twin.eval()(inputs).logits)
    assert balancing.steps_per_batch == 1


def test_random_numbers_depend_on_the_step():
    model = joint_model(dtype=torch.float64)
    inputs, draws = batch(size=31), []
    for steps in (0, 1, 1):
        balancer = eq.balance.ModalityCorruption(model)
        balancer.steps.fill_(steps)
        draws.append(corrupt(model, balancer, inputs)["audio"])
    assert torch.equal(draws[1], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_token_ids_and_missing_modalities_are_not_corrupted():
    model = joint_model(NAMES[:3], dtype=torch.float64)
    inputs = {**batch(NAMES[:3], size=SIZE), "text": torch.ones(SIZE, 3, dtype=torch.int64), "image": None}
    balancer = eq.balance.ModalityCorruption(model, probability=1.0)
    result = corrupt(model, balancer, inputs)
    assert result["text"] is inputs["text"]
    assert result["image"] is None
    assert not torch.equal(result["audio"], inputs["audio"])


def test_one_modality_of_each_sample_is_kept():
    model = joint_model(NAMES[:3], dtype=torch.float64)
    inputs = batch(NAMES[:3], size=SIZE, missing=("audio", "image"))
    inputs["audio"][~inputs["mask"]["audio"]] = torch.nan
    balancer = eq.balance.ModalityCorruption(model, probability=1.0, replace_prob=1.0)
    result = balancer.prepare(inputs)
    has = torch.stack([inputs["mask"].get(n, torch.ones(SIZE, dtype=torch.bool)) for n in model.names], dim=1)
    assert ((has & ~destroyed_mask(balancer)).sum(dim=1) == 1).all()
    assert result["audio"][inputs["mask"]["audio"]].isfinite().all()


def test_mapping_inputs_and_invalid_batches():
    model = joint_model(dtype=torch.float64)
    balancer = eq.balance.ModalityCorruption(model, probability=1.0)
    words = {"input_ids": torch.ones(5, 3, dtype=torch.int64)}
    result = balancer.prepare({"audio": words, "image": torch.randn(5, 4, 5)})
    assert result["audio"] is words
    assert destroyed_mask(balancer).shape == (5, 2)
    eq.BalancerList(model, [balancer])
    with pytest.raises(eq.EquipoiseError, match="a batch with audio, image"):
        model.train()({"audio": torch.ones(2, 3, 3)})


def test_attention_loss_applies_to_attention_fusion_only():
    for fusion, taught in ((eq.fusion.JointAttention(12, dropout=0.0), True), (eq.fusion.Concat(12), False)):
        encoders = {"audio": torch.nn.Linear(3, 12), "image": torch.nn.Linear(5, 12)}
        model = eq.FusionModel(encoders, fusion, 3).double()
        balancer = eq.balance.ModalityCorruption(model, weight=2.0)
        balancing = eq.BalancerList(model, [balancer])
        inputs = batch()
        output = model.train()(inputs)
        penalty = balancer.penalty(output, inputs["target"])
        assert (penalty is not None) is taught
        if taught:
            expected = 2.0 * oracle(output.share.detach(), ~balancer.kept("destroyed", output))
            assert float(penalty.detach()) == pytest.approx(expected, abs=EXACT["atol"])
        assert bool(balancing.loss(output, inputs["target"]).isfinite())


@pytest.mark.parametrize("options", [{"probability": 1.5}, {"replace_prob": -0.1}, {"weight": -1.0}])
def test_options_out_of_range_raise(options):
    with pytest.raises(
        ConfigError, match=r"ModalityCorruption: expected 0 <= probability <= 1, 0 <= replace_prob <= 1 and weight >= 0"
    ):
        eq.balance.ModalityCorruption(joint_model(), **options)


@pytest.mark.parametrize("fusion", [eq.fusion.Concat, eq.fusion.JointAttention])
def test_ensemble_logits_are_added_and_have_their_own_loss(fusion):
    torch.manual_seed(0)
    encoders = {"audio": torch.nn.Linear(3, 12), "image": torch.nn.Linear(5, 12)}
    model = eq.FusionModel(encoders, fusion(12), 3, unimodal="ensemble").double().eval()
    inputs = batch(missing=("audio",), size=7)
    output = model(inputs)
    has = inputs["mask"]["audio"][:, None]
    expected = model.head(output.features) + output.unimodal_logits["audio"] * has + output.unimodal_logits["image"]
    torch.testing.assert_close(output.logits, expected, **EXACT)
    # The fused loss does not train the heads.
    model.loss(output.logits, inputs["target"]).backward()
    assert all(p.grad is None for p in model.unimodal_heads.parameters())
    parts = eq.fusion.modality_contributions(model, inputs)
    torch.testing.assert_close(sum(parts.values()), output.logits.detach(), **EXACT)


def test_noise_has_the_statistics_of_valid_tokens():
    torch.manual_seed(0)
    encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
    model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
    balancer = eq.balance.ModalityCorruption(model, probability=1.0, replace_prob=1.0)
    eq.BalancerList(model, [balancer])
    mask = torch.arange(40) < torch.randint(1, 8, (300, 1))
    audio = (20 + 3 * torch.randn(300, 40, 3)).masked_fill(~mask[..., None], 0.0)
    batch = {"audio": audio, "image": torch.zeros(300, 2, 5), "mask": {"audio": mask}}
    result = model.train().preparations[0](batch)["audio"]
    replaced = (result != audio).flatten(1).any(dim=1)
    assert 50 < replaced.sum() < 250
    std, mean = torch.std_mean(result[replaced])
    # With the padding the mean would be about 2, and the standard deviation 6.
    assert abs(mean - 20) < 0.5
    assert abs(std - 3) < 0.3


def build_with_catalog(model, names, **options):
    return eq.balance.ModalityCorruption(model, corruptions=names, **{"probability": 1.0, **options})


def test_catalog_corrupts_only_drawn_samples():
    model = joint_model()
    inputs = batch(size=SIZE)
    balancer = build_with_catalog(model, ["zeros", "gain"], probability=0.5)
    result = corrupt(model, balancer, inputs)
    gone = destroyed_mask(balancer)
    for index, name in enumerate(("audio", "image")):
        changed = (result[name] != inputs[name]).flatten(1).any(dim=1)
        assert 0.3 < float(changed.double().mean()) < 0.7
        # Only zeros destroy; at severity 5 they replace the whole input.
        assert bool((result[name][gone[:, index]] == 0).all())
        assert bool(changed[gone[:, index]].all())
        assert 0.1 < float(gone[:, index].double().mean()) < 0.4
    again = corrupt(model, build_with_catalog(model, ["zeros", "gain"], probability=0.5), inputs)
    assert all(torch.equal(result[name], again[name]) for name in ("audio", "image"))
    balancer.before_step()
    assert not torch.equal(corrupt(model, balancer, inputs)["audio"], result["audio"])


def test_informative_corruptions_are_not_marked_destroyed():
    model = joint_model()
    balancer = build_with_catalog(model, ["gain", "shuffled"])
    result = corrupt(model, balancer, batch(size=SIZE))
    assert not bool(destroyed_mask(balancer).any())
    assert any(not torch.equal(result[name], batch(size=SIZE)[name]) for name in ("audio", "image"))


def test_missing_and_swapped_samples_are_masked():
    model = joint_model()
    inputs = batch(size=SIZE)
    balancer = build_with_catalog(model, ["missing"])
    result = corrupt(model, balancer, inputs)
    gone = destroyed_mask(balancer)
    assert not bool(gone.all(dim=1).any())
    for index, name in enumerate(("audio", "image")):
        assert torch.equal(result["mask"][name], ~gone[:, index])
    assert "mask" not in inputs
    lengths = torch.arange(7) < torch.arange(SIZE)[:, None] % 7 + 1
    padded = {**inputs, "mask": {"audio": lengths}}
    swapped = build_with_catalog(model, ["swapped"]).prepare(padded)
    expected = {tuple(row) for row in inputs["audio"].flatten(1).tolist()}
    assert {tuple(row) for row in swapped["audio"].flatten(1).tolist()} <= expected
    assert not torch.equal(swapped["mask"]["audio"], lengths)


def test_training_with_the_catalog_has_finite_gradients():
    model = joint_model().train()
    names = eq.diagnostics.corruptions.corruption_names("sequence")
    balancing = eq.BalancerList(model, [build_with_catalog(model, names)])
    inputs = batch(size=37, missing=("image",))
    for _ in range(20):
        model.zero_grad()
        balancing.loss(model(inputs), inputs["target"]).backward()
        balancing.before_step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_token_ids_are_corrupted_by_the_catalog():
    model = joint_model()
    ids = torch.arange(1, 5 * SIZE + 1).view(SIZE, 5)
    result = build_with_catalog(model, ["replaced", "gain"]).prepare({"audio": ids, "image": batch(size=SIZE)["image"]})
    assert not torch.equal(result["audio"], ids)
    assert result["audio"].dtype == ids.dtype


def test_errors_of_catalog_options():
    model = joint_model()
    with pytest.raises(ConfigError, match="known corruption, got 'frosen'"):
        build_with_catalog(model, ["frosen"])
    with pytest.raises(ConfigError, match="one or more corruptions, or None"):
        build_with_catalog(model, [])
    with pytest.raises(ConfigError, match="known kind of input, got 'video'"):
        build_with_catalog(model, ["zeros"], kinds={"audio": "video"})
    with pytest.raises(ConfigError, match="known modality, got 'sound'"):
        build_with_catalog(model, ["zeros"], kinds={"sound": "image"})
