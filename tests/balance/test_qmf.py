"""QMF against its equations: weights, ranking, the history of losses, accumulation, resume, errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.qmf import confidence, ranking_loss
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch, split_batch
from helpers.steps import attention_model, step
from helpers.tasks import additive_model, batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_d import cross_entropy, energy_weight, ranking, scaled
from oracles.plain import mean

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def attached(names=("audio", "image"), **options):
    model = additive_model(names, unimodal="none", task=options.pop("task", "classification"))
    balancer = eq.balance.QMF(model, **options)
    return model, balancer, eq.BalancerList(model, [balancer])


def numbered(size, *, start=0, **options):
    return {**batch(size=size, **options), "index": torch.arange(start, start + size)}


def logits_of(model, inputs):
    tokens = model.encode(inputs).values()
    return [to_lists(part(own.pooled())) for part, own in zip(model.head.parts, tokens, strict=True)]


@quick
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 1)), min_size=2, max_size=7))
def test_the_ranking_loss_equals_the_oracle(samples):
    weights, losses = zip(*samples, strict=True)
    present = torch.ones(len(samples), dtype=torch.bool)
    result = ranking_loss(doubles(weights), doubles(losses), present)
    assert float(result) == pytest.approx(ranking(weights, losses), abs=1e-12)


def test_weights_in_the_right_order_by_the_margin_cost_nothing():
    present = torch.ones(3, dtype=torch.bool)
    losses = doubles([0.0, 0.5, 1.0])
    assert float(ranking_loss(-losses, losses, present)) == 0
    assert float(ranking_loss(losses, losses, present)) == pytest.approx((1 + 1 + 2) / 3)
    # A pair counts only if both have the modality.
    assert float(ranking_loss(losses, losses, torch.tensor([True, False, True]))) == pytest.approx(2)


def test_confidence_of_labels_is_the_sum_of_their_energies():
    logits = doubles([[0.3, -2.0]])
    expected = energy_weight([0.3, 0.0], 1.0) + energy_weight([-2.0, 0.0], 1.0)
    assert float(confidence(logits, "multilabel")) == pytest.approx(expected)


@pytest.mark.parametrize("number", [2, 3])
def test_a_batch_without_history_equals_the_oracle(number):
    names = NAMES[:number]
    result, _, balancing = attached(names, scale=0.2, strength=0.7)
    inputs = batch(names, size=7)
    target, parts = inputs["target"].tolist(), logits_of(result, inputs)
    weights = [[energy_weight(row, 0.2) for row in part] for part in parts]
    output = result.train()(inputs)
    for i, actual in enumerate(to_lists(output.logits)):
        assert actual == pytest.approx(
            [sum(w[i] * p[i][k] for w, p in zip(weights, parts, strict=True)) for k in range(3)]
        )
    expected = mean(cross_entropy(row, y) for row, y in zip(to_lists(output.logits), target, strict=True))
    for own, scores in zip(weights, parts, strict=True):
        losses = [cross_entropy(row, y) for row, y in zip(scores, target, strict=True)]
        expected += mean(losses) + 0.7 * ranking(own, scaled(losses))
    assert float(balancing.loss(output, inputs["target"]).detach()) == pytest.approx(expected)
    step(result, balancing, inputs)
    log = {f"weight/{name}": mean(own) for name, own in zip(names, weights, strict=True)}
    assert balancing.end_epoch() == pytest.approx(log)


def test_parts_of_the_modalities_sum_to_the_logits():
    result, _, _ = attached()
    output = result(batch())
    torch.testing.assert_close(sum(result.contributions(output).values()), output.logits, **EXACT)


def test_samples_are_ranked_by_their_mean_loss_so_far():
    result, balancer, balancing = attached(samples=12)
    first, second = numbered(7, seed=1), numbered(5, start=7, seed=2)
    losses = {}
    for inputs in (first, second):
        step(result, balancing, inputs)
        for m, part in enumerate(logits_of(result, inputs)):
            for i, row, y in zip(inputs["index"].tolist(), part, inputs["target"].tolist(), strict=True):
                losses[m, i] = cross_entropy(row, y)
    balancing.end_epoch()
    optimizer = torch.optim.SGD(result.parameters(), lr=0.5)
    optimizer.step()
    again = {**first, "index": first["index"].flip(0)}
    target, parts = again["target"].tolist(), logits_of(result, again)
    expected = float(result.loss(result.train()(again).logits, again["target"]).detach())
    for m, part in enumerate(parts):
        now = [cross_entropy(row, y) for row, y in zip(part, target, strict=True)]
        means = [(losses[m, i] + new) / 2 for i, new in zip(again["index"].tolist(), now, strict=True)]
        past = [losses[m, i] for i in range(12)]
        weights = [energy_weight(row, 0.1) for row in part]
        expected += mean(now) + ranking(weights, scaled(means, past))
    assert float(balancing.loss(result(again), again["target"]).detach()) == pytest.approx(expected, rel=1e-6)
    assert balancer.history[1].tolist() == [[1.0, 1.0]] * 12


def test_history_of_accumulated_and_skipped_batches():
    result, balancer, balancing = attached(samples=12)
    full = {**numbered(12), "mask": {"image": torch.arange(12) > 3}}
    step(result, balancing, *split_batch(full, 5, 3, 4))
    balancing.loss(result(full), full["target"])
    bad = {**numbered(12), "audio": full["audio"] * torch.nan}
    step(result, balancing, bad)
    balancing.end_epoch()
    other = eq.balance.QMF(additive_model(unimodal="none"), samples=12)
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    assert other.history[1, :, 0].tolist() == [1.0] * 12
    assert other.history[1, :, 1].tolist() == [0.0] * 4 + [1.0] * 8
    for m, part in enumerate(logits_of(result, full)):
        for i, row in enumerate(part):
            if m == 0 or i > 3:
                loss = cross_entropy(row, int(full["target"][i]))
                assert float(other.history[0, i, m]) == pytest.approx(loss, rel=1e-6)


def test_a_missing_modality_has_no_weight():
    result, _, balancing = attached()
    inputs = {**batch(size=7), "mask": {"image": torch.arange(7) > 2}}
    output = result.train()(inputs)
    head = result.head.parts[0](result.encode(inputs)["audio"].pooled())
    expected = 0.1 * head.logsumexp(dim=1, keepdim=True) * head
    torch.testing.assert_close(output.logits[:3], expected[:3], **EXACT)
    assert bool(balancing.loss(output, inputs["target"]).isfinite())


def test_a_loss_in_evaluation_mode_needs_no_numbers():
    result, balancer, balancing = attached(samples=5)
    loss = balancing.loss(result.eval()(batch()), batch()["target"])
    balancer.samples = None
    torch.testing.assert_close(loss, balancing.loss(result.train()(batch()), batch()["target"]), **EXACT)
    balancing.before_step()
    assert not balancer.epoch.any()


def test_labels_train():
    result, _, balancing = attached(task="multilabel")
    actual = step(result, balancing, batch_for("multilabel", size=7))
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in actual.values())


def test_errors():
    with pytest.raises(ConfigError, match=r"QMF: expected a task with classes or labels, .* got a regression"):
        eq.balance.QMF(additive_model(task="regression"))
    for wrong in ({"scale": 0.0}, {"strength": -1.0}, {"samples": 0}):
        with pytest.raises(ConfigError, match=r"QMF: expected scale > 0, strength >= 0 and samples >= 1 or None, got"):
            eq.balance.QMF(additive_model(), **wrong)
    with pytest.raises(ConfigError, match="QMF: expected a fusion whose features are the concatenated pooled vectors"):
        eq.balance.QMF(attention_model())
    result, _, _ = attached(samples=5)
    with pytest.raises(ConfigError, match=r"QMF: expected batch\['index'\], .* got NoneType\. .*samples=None"):
        result.train()(batch())
    with pytest.raises(
        ConfigError, match="QMF: expected sample numbers from 0 to samples - 1 = 4, got numbers from 1 to 5"
    ):
        result(numbered(5, start=1))
