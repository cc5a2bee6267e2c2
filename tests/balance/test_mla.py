"""MLA against its equations: alternation, the projector, predictions averaged by certainty, missing modalities,
errors.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.mla import certainty_weights, next_projector
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model, gradients, step
from helpers.tolerance import TOL
from oracles.balance_c import by_entropy, mean, projector

EXACT = TOL[torch.float64]


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def build(names=("audio", "image"), *, fusion=eq.fusion.Concat, seed=0, dtype=torch.float64, projected=True, **options):
    model = attention_model(names, fusion=fusion(DIM), seed=seed, dtype=dtype, **{"unimodal": "probe", **options})
    balancer = eq.balance.MLA(model, projected=projected)
    return model, balancer, eq.BalancerList(model, [balancer])


def test_projector_by_hand():
    # k = r = (1, 0), so diag(1 - 1 / 2, 1) over its length sqrt(1.25).
    result = next_projector(torch.eye(2, dtype=torch.float64), doubles(1, 0), alpha=1.0)
    torch.testing.assert_close(result, doubles([0.5, 0], [0, 1]) / 1.25**0.5, **EXACT)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.1))
def test_projector_equals_the_oracle(seed, alpha):
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result, slow = torch.eye(5, dtype=torch.float64), torch.eye(5).tolist()
    for row in rows:
        result, slow = next_projector(result, row, alpha=alpha), projector(slow, row.tolist(), alpha)
    torch.testing.assert_close(result, doubles(*slow), **EXACT)
    torch.testing.assert_close(result, result.T, **EXACT)
    assert float(result.norm()) == pytest.approx(1.0)


def test_projector_removes_seen_features():
    row = doubles(1, 2, 2)
    after = next_projector(torch.eye(3, dtype=torch.float64), row, alpha=1e-9)
    assert float((after @ row).norm()) < 1e-8
    across = doubles(2, -1, 0)
    torch.testing.assert_close(after @ across, across / 2**0.5, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_certain_predictions_have_larger_weight(seed):
    logits = 3 * torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    has = torch.ones(7, 3, dtype=torch.bool)
    has[1, 0] = has[2, 1] = has[2, 2] = False
    weights = certainty_weights(logits, has, "classification")
    for sample in range(7):
        kept = [m for m in range(3) if has[sample, m]]
        expected, _ = by_entropy([logits[sample, m].tolist() for m in kept])
        assert weights[sample, kept].tolist() == pytest.approx(expected, rel=1e-10)
    assert weights[~has].tolist() == [0.0, 0.0, 0.0]


def test_certainty_of_multilabel_and_regression():
    has = torch.ones(1, 2, dtype=torch.bool)
    logits = doubles([[[0.0, 0.0, 0.0], [40.0, -40.0, 0.0]]])[0]
    # Mean entropies log 2 and log 2 / 3, so weights go as 2^-1 and 2^(-1/3).
    weights = certainty_weights(logits, has, "multilabel")[0]
    assert float(weights[1] / weights[0]) == pytest.approx(2 ** (2 / 3))
    assert certainty_weights(logits, has, "regression")[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("fusion", [eq.fusion.Concat, eq.fusion.Sum])
def test_predictions_are_averaged_by_certainty(fusion):
    model, _, _ = build(NAMES[:3], fusion=fusion)
    inputs = batch(NAMES[:3], missing=("audio", "image"))
    output = model.eval()(inputs)
    for sample in range(5):
        rows = []
        for name in NAMES[:3]:
            if name not in inputs["mask"] or bool(inputs["mask"][name][sample]):
                rows.append(model.head.classifier(output.tokens[name].pooled()[sample]).tolist())
        assert output.logits[sample].tolist() == pytest.approx(by_entropy(rows)[1], rel=1e-10)


def test_sample_without_modalities_has_finite_logits():
    model, _, _ = build()
    inputs = {**batch(size=2), "mask": {name: torch.tensor([True, False]) for name in ("audio", "image")}}
    assert bool(model(inputs).logits.isfinite().all())


@pytest.mark.parametrize("number", [2, 3])
def test_each_step_trains_one_modality(number):
    names = NAMES[:number]
    model, balancer, balancing = build(names, unimodal="none", projected=False)
    assert balancing.steps_per_batch == number
    for turn in range(2 * number):
        name, inputs = names[turn % number], batch(names, seed=turn // number)
        result = step(model, balancing, inputs)
        output = model(inputs)
        loss = model.loss(model.head.classifier(output.tokens[name].pooled()), inputs["target"])
        assert {key for key in result if key.startswith("enc")} == {f"encoders.{name}.{p}" for p in ("weight", "bias")}
        encoder, head = gradients(loss, [model.encoders[name].weight, model.head.classifier.weight])
        torch.testing.assert_close(result[f"encoders.{name}.weight"], encoder, **EXACT)
        torch.testing.assert_close(result["head.classifier.weight"], head, **EXACT)
    assert int(balancer.steps) == 2 * number


def test_head_gradient_is_projected():
    model, balancer, balancing = build(unimodal="none")
    slow = torch.eye(DIM).tolist()
    for epoch in range(2):
        for turn in range(6):
            name, inputs = ("audio", "image")[turn % 2], batch(seed=10 * epoch + turn // 2)
            # Of three batches an epoch, counted in the first.
            alpha = 0.1 ** (1 + (turn // 2) / 3) if epoch else 0.1
            vectors = model.encode(inputs)[name].pooled()
            (plain,) = gradients(
                model.loss(model.head.classifier(vectors), inputs["target"]), [model.head.classifier.weight]
            )
            slow = projector(slow, [mean(column) for column in vectors.T.tolist()], alpha)
            result = step(model, balancing, inputs)
            torch.testing.assert_close(result["head.classifier.weight"], plain @ doubles(*slow), **EXACT)
        assert balancer.end_epoch() == {}


def test_accumulated_batches_equal_one_large_batch():
    full = batch(size=12)
    model, _, balancing = build()
    other, _, rebalancing = build()
    for _ in range(2):
        large, small = step(model, balancing, full), step(other, rebalancing, *split_batch(full, 5, 3, 4))
        assert large.keys() == small.keys()
        for name, gradient in large.items():
            torch.testing.assert_close(small[name], gradient, **EXACT)


def test_samples_without_the_modality_are_excluded():
    model, balancer, balancing = build(unimodal="none")
    full = batch(size=7, missing=("audio",))
    here = full["mask"]["audio"]
    result = step(model, balancing, full)
    kept = model.encode(full)["audio"].pooled()[here]
    (plain,) = gradients(model.loss(model.head.classifier(kept), full["target"][here]), [model.head.classifier.weight])
    expected = next_projector(torch.eye(DIM, dtype=torch.float64), kept.mean(dim=0).detach(), alpha=0.1)
    torch.testing.assert_close(balancer.projector, expected, **EXACT)
    torch.testing.assert_close(result["head.classifier.weight"], plain @ expected, **EXACT)


def test_step_of_missing_modality_is_skipped():
    model, balancer, balancing = build()
    result = step(model, balancing, {**batch(), "audio": None})
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())
    assert float(result["head.classifier.weight"].abs().max()) == 0.0
    assert bool(balancer.projector.isfinite().all())
    assert "encoders.image.weight" in step(model, balancing, batch())


@pytest.mark.parametrize("unimodal", ["probe", "train"])
def test_unimodal_heads_are_detached(unimodal):
    model, _, balancing = build(unimodal=unimodal)
    result = step(model, balancing, batch())
    assert "unimodal_heads.image.weight" in result
    assert "encoders.image.weight" not in result


def test_resumed_training_equals_uninterrupted_training():
    model, balancer, balancing = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(model, balancing, optimizer, seeds):
        for seed in seeds:
            step(model, balancing, batch(seed=seed))
            optimizer.step()
        return model.state_dict()

    train(model, balancing, optimizer, range(4))
    balancing.end_epoch()
    train(model, balancing, optimizer, range(3))
    fresh, other, rebalancing = build(seed=9)
    for part, state in ((fresh, model.state_dict()), (other, balancer.state_dict())):
        part.load_state_dict(copy.deepcopy(state))
    straight = train(model, balancing, optimizer, range(3, 5))
    resumed = train(fresh, rebalancing, torch.optim.SGD(fresh.parameters(), lr=0.1), range(3, 5))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_all_tasks(task):
    model, _, balancing = build(task=task, unimodal="none")
    inputs = batch()
    inputs["target"] = torch.nn.functional.one_hot(inputs["target"], 3).double()
    loss = balancing.loss(model(inputs), inputs["target"])
    expected = model.loss(model.head.classifier(model.encode(inputs)["audio"].pooled()), inputs["target"])
    torch.testing.assert_close(loss, expected, **EXACT)


def test_autocast():
    model, balancer, balancing = build(dtype=torch.float32)
    inputs = batch(dtype=torch.float32)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = balancing.loss(model.train()(inputs), inputs["target"])
        loss.backward()
        balancing.before_step()
    assert bool(balancer.projector.isfinite().all())
    assert bool(model.head.classifier.weight.grad.isfinite().all())


def test_errors():
    with pytest.raises(ConfigError, match="MLA: expected two or more modalities, got audio"):
        eq.balance.MLA(attention_model(("audio",), fusion=eq.fusion.Concat(DIM)))
    with pytest.raises(
        ConfigError, match=r"MLA: expected a fusion whose features are .*, got JointAttention. Use Concat"
    ):
        eq.balance.MLA(attention_model())


@pytest.mark.parametrize("other", ["MBSD", "MMPareto"])
def test_balancers_that_need_trained_heads_raise(other):
    model = attention_model(fusion=eq.fusion.Concat(DIM))
    with pytest.raises(ConfigError, match=f"MLA with {other}: it needs unimodal heads that train the encoders"):
        eq.BalancerList(model, [getattr(eq.balance, other)(model), eq.balance.MLA(model)])
