"""Re-learning against its equations: purity, gaps, resets of encoders and optimizer state, errors."""

import copy
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.relearning import kmeans_labels, purity
from equipoise.errors import ConfigError
from helpers.fusion import DIM, batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_b import purity as slow_purity

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def build(result=None, optimizer=torch.optim.SGD, **options):
    """A model, a balancer of it that acts every epoch, and the optimizer attached to it."""
    result = result or additive_model()
    balancer = eq.balance.DiagnoseRelearn(result, **{"every": 1, **options})
    chosen = optimizer(result.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
    eq.BalancerList(result, [balancer]).attach_optimizer(chosen)
    return result, balancer, chosen


def perturb_weights(model, seed=0):
    """Changes all weights."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)


def separable_batch(size=30, *, apart, seed=0):
    """Audio separable by class, and an image without information."""
    inputs = batch(size=size, seed=seed)
    inputs["audio"] = inputs["audio"] * 0.1 + apart * torch.nn.functional.one_hot(inputs["target"], 3)[:, None].double()
    inputs["image"] = torch.zeros_like(inputs["image"])
    return inputs


@quick
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=30))
def test_purity_equals_the_oracle(samples):
    clusters, first, second = (torch.tensor(column) for column in zip(*samples, strict=True))
    expected = [slow_purity(to_lists(clusters), to_lists(labels)) for labels in (first, second)]
    assert purity(clusters, first[:, None]) == pytest.approx(expected[0])
    assert purity(clusters, torch.stack([first, second], dim=1)) == pytest.approx(sum(expected) / 2)


def test_clustering_uses_scaled_features_and_is_deterministic():
    # The second dimension is long and says nothing; the first one tells three groups apart.
    random = torch.Generator().manual_seed(0)
    group = torch.arange(30) % 3
    features = torch.stack([group + 0.01 * torch.randn(30, generator=random), 100 + 0 * group], dim=1)
    state = torch.get_rng_state()
    result = kmeans_labels(features, 3, seed=0)
    assert purity(result, group[:, None]) == 1
    assert torch.equal(kmeans_labels(1000 * features - 7, 3, seed=0), result)
    assert torch.equal(torch.get_rng_state(), state)
    assert to_lists(kmeans_labels(torch.ones(5, 2), 3, seed=0)) == [0] * 5


def test_gaps_are_purity_differences():
    model, balancer, _ = build()
    train, val = separable_batch(apart=5.0), separable_batch(apart=0.0, seed=1)
    gaps = balancer.gaps([train], [val])
    features = model.eval().encode(val)["audio"].pooled().detach()
    pure = slow_purity(to_lists(kmeans_labels(features, 3, seed=0)), to_lists(val["target"]))
    assert pure < 0.8
    assert float(gaps[0]) == pytest.approx(1 - pure)
    # All images are alike: one cluster, as pure as the most frequent class.
    most = [max(inputs["target"].bincount()) / 30 for inputs in (train, val)]
    assert float(gaps[1]) == pytest.approx(float(abs(most[0] - most[1])))


def test_encoders_are_reset_in_proportion_to_overfitting():
    model, balancer, _ = build(strength=2.0)
    first = copy.deepcopy(model.state_dict())
    perturb_weights(model)
    last = copy.deepcopy(model.state_dict())
    train, val = [separable_batch(apart=5.0)], [separable_batch(apart=0.0, seed=1)]
    weights = [math.tanh(2.0 * gap) for gap in to_lists(balancer.gaps(train, val))]
    assert weights[0] > 0.3
    balancer.review(train, val)
    for name, result in model.state_dict().items():
        weight = sum(w for n, w in zip(model.names, weights, strict=True) if name.startswith(f"encoders.{n}."))
        torch.testing.assert_close(result, weight * first[name] + (1 - weight) * last[name], **EXACT)
    assert balancer.end_epoch() == pytest.approx({"reset/audio": weights[0], "reset/image": weights[1]})


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_state_of_reset_encoders_is_cleared(optimizer):
    model, balancer, chosen = build(optimizer=optimizer)
    step(model, eq.BalancerList(model), batch(size=7))
    chosen.step()
    alike = separable_batch(apart=5.0)
    balancer.review(
        [alike], [separable_batch(apart=0.0, seed=1) | {"image": alike["image"], "target": alike["target"]}]
    )
    encoder = model.encoders["audio"]
    assert not any(p in chosen.state for p in encoder.parameters())
    # The image's gap is 0, and the head belongs to no modality.
    assert all(p in chosen.state for p in (*model.encoders["image"].parameters(), *model.head.parameters()))
    before = encoder.weight.detach().clone()
    step(model, eq.BalancerList(model), batch(size=7))
    chosen.step()
    assert not torch.equal(encoder.weight, before)


def test_epochs_of_resets():
    model, balancer, _ = build(every=2, times=2, epochs=9)
    train, val, acted = [separable_batch(apart=5.0)], [separable_batch(apart=0.0, seed=1)], []
    for _ in range(8):
        balancer.review(train, val)
        acted.append(balancer.end_epoch()["reset/audio"] > 0)
    assert acted == [False, True, False, True, False, False, False, False]
    _, balancer, _ = build(model, every=2, epochs=2)
    for _ in range(2):
        # Nothing is looked at where it is not time, and the last epoch would be lost.
        balancer.review(iter([None]), iter([None]))
        assert balancer.end_epoch() == {"reset/audio": 0.0, "reset/image": 0.0}


def test_state_dict_contains_the_initial_weights():
    model, balancer, _ = build()
    perturb_weights(model)
    states = copy.deepcopy([model.state_dict(), balancer.state_dict()])
    fresh, other, _ = build(additive_model(seed=9))
    fresh.load_state_dict(states[0])
    other.load_state_dict(states[1])
    train, val = [separable_batch(apart=5.0)], [separable_batch(apart=0.0, seed=1)]
    for each in (balancer, other):
        each.review(train, val)
    assert balancer.end_epoch() == other.end_epoch() != {"reset/audio": 0.0, "reset/image": 0.0}
    assert all(torch.equal(result, fresh.state_dict()[name]) for name, result in model.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_all_tasks(task):
    model, balancer, _ = build(attention_model(task=task))
    data = [batch_for(task, size=size, seed=size, missing=("audio", "image")) for size in (13, 11, 17)]
    gaps = balancer.gaps(data[:2], data[2:])
    assert all(0 < gap < 1 for gap in to_lists(gaps))
    balancer.review(data[:2], [{**data[2], "image": None, "mask": {}}])
    assert float(balancer.end_epoch()["reset/image"]) == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_training_modes_and_rng_state_are_restored():
    model, balancer, _ = build(attention_model(fusion=eq.fusion.JointAttention(DIM, heads=2, dropout=0.5)))
    model.train()
    state = torch.get_rng_state()
    balancer.review([batch(size=7)], [batch(size=7, seed=1)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


class Plain(pl.LightningModule):
    """A user's module that contains a model."""

    def __init__(self, model, balancer):
        super().__init__()
        self.model, self.balancing = model, eq.BalancerList(model, [balancer])

    def training_step(self, inputs, index):
        return self.balancing.loss(self.model(inputs), inputs["target"])

    def validation_step(self, inputs, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def test_lightning_attaches_the_optimizer(tmp_path):
    model = additive_model()
    module = Plain(model, eq.balance.DiagnoseRelearn(model, every=1, times=1))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
        callbacks=[eq.lightning.BalancerCallback(module.balancing)],
    )  # fmt: skip
    train, val = (
        torch.utils.data.DataLoader([inputs], batch_size=None)
        for inputs in (separable_batch(apart=5.0), separable_batch(apart=0.0, seed=1))
    )
    with warnings.catch_warnings():
        # Lightning's own, of this torch.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit(module, train, val)
    state = trainer.optimizers[0].state
    assert not any(p in state for p in model.encoders["audio"].parameters())
    assert all(p in state for p in model.head.parameters())
    assert trainer.callback_metrics["balance/reset/audio"] > 0


def test_errors():
    with pytest.raises(ConfigError, match="DiagnoseRelearn: expected two or more modalities, got audio"):
        eq.balance.DiagnoseRelearn(attention_model(("audio",)))
    for wrong in ({"every": 0}, {"times": -1}, {"strength": 0.0}, {"bins": 1}):
        with pytest.raises(ConfigError, match=f"DiagnoseRelearn: expected every >= 1, .* got .*{next(iter(wrong))} = "):
            eq.balance.DiagnoseRelearn(attention_model(), **wrong)
    with pytest.raises(ConfigError, match=r"expected the optimizer, .* Call balancing.attach_optimizer\(optimizer\)"):
        eq.balance.DiagnoseRelearn(attention_model()).review([batch()], [batch()])
    with pytest.raises(ConfigError, match="expected training and validation batches to review, got none"):
        build()[1].review([batch()], [])
