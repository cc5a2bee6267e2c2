"""PMR against its equations: weights, prototypes and their momentum, every task, missing samples, errors."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.common.class_prototypes import prototype_log_probabilities
from equipoise.balance.common.target_categories import bin_edges, categories
from equipoise.balance.pmr import prototype_weights
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, assert_like_single_precision, batch_for, loss_of, penalty_of, to_lists
from helpers.tolerance import TOL
from oracles.balance_b import class_mean, pmr, prototype_probabilities

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def pooled_features(model, inputs):
    tokens = model.eval().encode(inputs)
    return [to_lists(tokens[name].pooled()) for name in model.names]


def build_reviewed(model, data, **options):
    """Returns a PMR after one review of all these batches."""
    balancer = eq.balance.PMR(model, **{"fraction": 1.0, **options})
    for inputs in data:
        penalty_of(balancer, model, inputs)
    balancer.review(data, [])
    return balancer


@pytest.mark.parametrize(
    ("rho", "gamma", "beta"), [(1.5, 0.5, 0), (3, 1, 0), (1, 0, 0), (1 / 1.5, 0, 0.5), (0.1, 0, 1)]
)
def test_worked_examples(rho, gamma, beta):
    lags, leads = prototype_weights(doubles(0.2 * rho, 0.2))
    torch.testing.assert_close(lags, doubles(beta, gamma), **EXACT)
    torch.testing.assert_close(leads, doubles(gamma, beta), **EXACT)


def test_three_modalities_use_best_and_worst_scores():
    lags, leads = prototype_weights(doubles(0.6, 0.5, 0.4))
    torch.testing.assert_close(lags, doubles(0, 0.2, 0.5), **EXACT)
    torch.testing.assert_close(leads, doubles(0.5, 0.25, 0), **EXACT)


def test_modality_missing_from_all_samples_is_excluded():
    lags, leads = prototype_weights(doubles(math.nan, 0.6, 0.4))
    torch.testing.assert_close(lags, doubles(0, 0, 0.5), **EXACT)
    torch.testing.assert_close(leads, doubles(0, 0.5, 0), **EXACT)


def test_zero_scores_are_finite():
    assert [w.tolist() for w in prototype_weights(doubles(0.5, 0))] == [[0, 1], [1, 0]]
    assert [w.tolist() for w in prototype_weights(doubles(0, 0))] == [[0, 0], [0, 0]]


@quick
@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=5))
def test_best_modality_has_no_prototype_loss_and_worst_no_entropy(scores):
    lags, leads = prototype_weights(doubles(*scores))
    assert float(lags[scores.index(max(scores))]) == 0
    assert float(leads[scores.index(min(scores))]) == 0
    assert all(0 <= w <= 1 for w in (*lags.tolist(), *leads.tolist()))


def test_probabilities_and_gradient_at_a_prototype():
    feature = doubles(3, 4)[None, None].requires_grad_()
    prototypes = torch.stack([doubles(3, 4), doubles(0, 0), doubles(9, 9)])[None, None]
    log_p = prototype_log_probabilities(feature, prototypes, torch.tensor([[[True, True, False]]]))[0, 0, 0]
    assert float(log_p[0].detach()) == pytest.approx(-math.log(1 + math.exp(-5)))
    assert float(log_p[2].detach().exp()) == 0
    log_p[0].backward()
    assert bool(feature.grad.isfinite().all())
    # Only the way from the second prototype counts: p_1 times the unit vector (0.6, 0.8).
    p = math.exp(-5) / (1 + math.exp(-5))
    torch.testing.assert_close(feature.grad[0, 0], doubles(0.6 * p, 0.8 * p), **EXACT)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_penalty_equals_the_oracle(hard, seed):
    model, data = additive_model(seed=seed), [batch(size=11, seed=seed), batch(size=7, seed=seed + 50)]
    balancer = build_reviewed(model, data, alpha=2.0, mu=0.1, hard=hard)
    features = [a + b for a, b in zip(*(pooled_features(model, inputs) for inputs in data), strict=True)]
    labels = [label for inputs in data for label in to_lists(inputs["target"])]
    prototypes = [[class_mean(f, labels, c) for c in range(3)] for f in features]
    inputs = batch(size=5, seed=seed + 7)
    expected = pmr(pooled_features(model, inputs), prototypes, to_lists(inputs["target"]), 2.0, 0.1, hard)
    assert abs(expected) > 1e-4
    assert float(penalty_of(balancer, model, inputs)) == pytest.approx(expected, rel=1e-9)


def test_entropy_term_ends_after_its_epochs():
    model, inputs = additive_model(), batch(size=11)
    balancer = build_reviewed(model, [inputs], entropy_epochs=1, mu=10.0)
    features, labels = pooled_features(model, inputs), to_lists(inputs["target"])
    prototypes = [[class_mean(f, labels, c) for c in range(3)] for f in features]
    for mu in (10.0, 0.0):
        result = float(penalty_of(balancer, model, inputs))
        assert result == pytest.approx(pmr(features, prototypes, labels, 1.0, mu), rel=1e-9)
        balancer.review([inputs], [])


def test_prototypes_are_updated_with_momentum():
    model, first, second = additive_model(), batch(size=11), batch(size=7, seed=1)
    # A class that the second review does not show keeps its prototype.
    second["target"] = second["target"].clamp(max=1)
    balancer = build_reviewed(model, [first], momentum=0.3)
    balancer.review([second], [])
    for index, name in enumerate(model.names):
        old, new = (pooled_features(model, inputs)[index] for inputs in (first, second))
        for c in range(3):
            before, after = (
                class_mean(old, to_lists(first["target"]), c),
                class_mean(new, to_lists(second["target"]), c),
            )
            expected = before if after is None else [0.3 * a + 0.7 * b for a, b in zip(before, after, strict=True)]
            torch.testing.assert_close(balancer.prototypes[index, 0, c], doubles(*expected), **EXACT, msg=name)


def test_class_without_prototype_is_excluded():
    model, few = additive_model(), batch(size=11)
    few["target"] = few["target"].clamp(max=1)
    balancer = build_reviewed(model, [few])
    inputs = batch(size=7, seed=3)
    known = inputs["target"] < 2
    assert 0 < int(known.sum()) < 7
    some = {name: value[known] for name, value in inputs.items()}
    assert float(penalty_of(balancer, model, inputs)) == pytest.approx(float(penalty_of(balancer, model, some)))


def test_prototypes_from_a_fraction_of_batches():
    model, balancer, data = additive_model(), None, [batch(seed=seed) for seed in range(12)]
    balancer = eq.balance.PMR(model, fraction=0.1)
    for inputs in data:
        penalty_of(balancer, model, inputs)
    asked = iter(data)
    balancer.review(asked, [])
    assert len(list(asked)) == 10
    assert int(balancer.batches) == 0


def test_first_epoch_applies_no_scaling():
    model, inputs = additive_model(), batch()
    balancing = eq.BalancerList(model, [eq.balance.PMR(model)])
    assert loss_of(balancing, model, inputs) == loss_of(eq.BalancerList(model), model, inputs)
    assert balancing.end_epoch() == {"weight/audio": 0.0, "weight/image": 0.0}


def test_encoders_are_scaled_and_factors_logged():
    model, inputs = attention_model(), batch(size=11)
    balancer = build_reviewed(model, [inputs], alpha=3.0)
    result, plain = step(model, eq.BalancerList(model, [balancer]), inputs), step(model, eq.BalancerList(model), inputs)
    changed = {name for name in plain if not torch.equal(result[name], plain[name])}
    assert changed
    assert all(name.startswith("encoders") for name in changed)
    log = balancer.end_epoch()
    assert max(log.values()) > 0 == min(log.values())
    assert balancer.end_epoch() == {"weight/audio": 0.0, "weight/image": 0.0}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("number", [2, 3])
def test_all_tasks(task, number):
    names = NAMES[:number]
    model, inputs = attention_model(names, task=task), batch_for(task, names, size=11, missing=names[:2])
    balancer = build_reviewed(model, [inputs], fraction=1.0)
    result = step(model, eq.BalancerList(model, [balancer]), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())
    assert sum(balancer.end_epoch().values()) > 0


def test_multilabel_uses_two_classes_per_label():
    model, inputs = additive_model(task="multilabel"), batch_for("multilabel", size=11)
    balancer = build_reviewed(model, [inputs], mu=0.0)
    target, features = to_lists(inputs["target"]), pooled_features(model, inputs)
    scores, losses = [], []
    for f in features:
        true = []
        for label in range(3):
            column = [int(row[label]) for row in target]
            prototypes = [class_mean(f, column, c) for c in range(2)]
            true += [prototype_probabilities(row, prototypes)[c] for row, c in zip(f, column, strict=True)]
        scores.append(sum(true) / len(true))
        losses.append(sum(-math.log(p) for p in true) / len(true))
    expected = sum(min(max(scores) / s - 1, 1) * loss for s, loss in zip(scores, losses, strict=True))
    assert float(penalty_of(balancer, model, inputs)) == pytest.approx(expected, rel=1e-9)


def test_targets_of_a_regression_are_binned_once():
    target = torch.arange(1000, dtype=torch.float64) / 999 * 6 - 3
    normal = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    edges = bin_edges(normal, 5)
    sizes = categories(normal, "regression", edges)
    assert sizes[:, 0].bincount().tolist() == pytest.approx([200] * 5, abs=3)
    assert categories(target, "regression", bin_edges(normal, 2))[:, 0].tolist() == [0] * 500 + [1] * 500
    model, inputs = additive_model(task="regression"), batch_for("regression", size=11)
    balancer = build_reviewed(model, [inputs], bins=3)
    first = balancer.edges.clone()
    assert first.shape == (3, 2)
    balancer.review([{**inputs, "target": inputs["target"] + 10}], [])
    assert torch.equal(balancer.edges, first)


def test_samples_without_the_modality_are_excluded():
    model, full = additive_model(), batch(size=13, missing=("image",))
    here = full["mask"]["image"]
    balancer = build_reviewed(model, [full])
    features = pooled_features(model, full)
    labels = to_lists(full["target"])
    for c in range(3):
        kept = [(f, y) for f, y, h in zip(features[1], labels, to_lists(here), strict=True) if h]
        expected = class_mean([f for f, _ in kept], [y for _, y in kept], c)
        torch.testing.assert_close(balancer.prototypes[1, 0, c], doubles(*expected), **EXACT)
    gone = {**full, "image": None, "mask": {}}
    assert float(penalty_of(balancer, model, gone)) == 0
    assert float(penalty_of(balancer, model, full)) != 0


def test_resume_from_saved_state():
    model, inputs = additive_model(), batch(size=11)
    balancer = build_reviewed(model, [inputs])
    penalty_of(balancer, model, inputs)
    other = eq.balance.PMR(model, fraction=1.0)
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    assert float(penalty_of(other, model, inputs)) == float(penalty_of(balancer, model, inputs))
    assert other.end_epoch() == balancer.end_epoch()


def test_autocast():
    model, inputs = attention_model(dtype=torch.float32), batch(dtype=torch.float32)
    balancer = build_reviewed(model, [inputs])
    assert_like_single_precision(balancer, model, inputs)


def test_errors():
    with pytest.raises(ConfigError, match="PMR: expected two or more modalities, got audio"):
        eq.balance.PMR(attention_model(("audio",)))
    with pytest.raises(ConfigError, match=r"expected mu >= 0 and bins >= 2, got alpha = 1.0, mu = -1, .*bins = 1"):
        eq.balance.PMR(attention_model(), mu=-1, bins=1)
    for wrong in ({"alpha": -1}, {"momentum": 1.0}, {"fraction": 0.0}, {"entropy_epochs": -1}):
        with pytest.raises(ConfigError, match=f"expected .*{next(iter(wrong))}"):
            eq.balance.PMR(attention_model(), **wrong)
    with pytest.raises(ConfigError, match="expected one or more training batches in review, got none"):
        eq.balance.PMR(attention_model()).review([], [])
