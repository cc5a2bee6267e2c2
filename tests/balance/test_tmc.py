"""TMC against its equations: Dempster's rule, the evidential loss, whole batches, missing modalities, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.tmc import combined_evidence, evidential_losses
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch
from helpers.steps import attention_model, step
from helpers.tasks import additive_model, batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_d import dempster, evidential, softplus
from oracles.plain import mean

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)
evidences = st.lists(st.floats(0, 50), min_size=3, max_size=3)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def attached(names=("audio", "image"), *, annealing=10, fusion=eq.fusion.Concat, **options):
    model = attention_model(names, fusion=fusion(DIM), **{"unimodal": "none", **options})
    balancer = eq.balance.TMC(model, annealing=annealing)
    return model, balancer, eq.BalancerList(model, [balancer])


def evidence_of(model, inputs):
    """Returns name -> rows of evidence of each modality, 0 where a sample lacks it."""
    result = {}
    for m, name in enumerate(model.names):
        tokens = model.encode(inputs)[name]
        here = tokens.present().tolist() if len(tokens) else [False] * len(inputs["target"])
        scores = to_lists(model.head.parts[m](tokens.pooled()))
        result[name] = [[softplus(y) if h else 0.0 for y in row] for row, h in zip(scores, here, strict=True)]
    return result


@quick
@given(st.lists(evidences, min_size=2, max_size=4))
def test_the_closed_form_is_dempsters_rule_for_any_number(parts):
    expected = parts[0]
    for other in parts[1:]:
        expected = dempster(expected, other)
    assert combined_evidence(doubles([parts]))[0].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@quick
@given(st.lists(evidences, min_size=2, max_size=4), st.permutations(range(4)))
def test_the_order_and_empty_evidence_change_nothing(parts, order):
    full = combined_evidence(doubles([parts]))
    changed = [parts[m] for m in order if m < len(parts)] + [[0.0, 0.0, 0.0]]
    torch.testing.assert_close(combined_evidence(doubles([changed])), full, **EXACT)


@quick
@given(evidences, st.integers(0, 2), st.floats(0, 1))
def test_the_loss_equals_the_oracle(evidence, target, strength):
    truth = torch.nn.functional.one_hot(torch.tensor([target]), 3).double()
    result = evidential_losses(doubles([evidence]), truth, strength=strength)
    assert float(result) == pytest.approx(evidential(evidence, target, strength), rel=1e-9, abs=1e-9)


def test_gradients_of_the_loss():
    truth = torch.nn.functional.one_hot(torch.tensor([1, 2]), 3).double()
    evidence = doubles([[0.3, 2.0, 4.0], [1.0, 0.1, 0.2]]).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: evidential_losses(e, truth, strength=0.7), evidence)
    assert torch.autograd.gradcheck(combined_evidence, doubles([[[0.3, 2.0], [4.0, 0.1]]]).requires_grad_())


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("missing", [(), ("audio", "image")])
@pytest.mark.parametrize("epoch", [0, 3, 20])
def test_a_batch_equals_the_oracle(number, missing, epoch):
    names = NAMES[:number]
    result, balancer, balancing = attached(names)
    for _ in range(epoch):
        balancer.end_epoch()
    inputs = batch(names, size=7, missing=missing)
    strength, target = min(1.0, (epoch + 1) / 10), inputs["target"].tolist()
    parts = evidence_of(result, inputs)
    full = []
    for i in range(7):
        joint = parts[names[0]][i]
        for name in names[1:]:
            joint = dempster(joint, parts[name][i])
        full.append(joint)
    output = result.train()(inputs)
    for actual, joint in zip(to_lists(output.logits.softmax(dim=1)), full, strict=True):
        assert actual == pytest.approx([(e + 1) / (sum(joint) + 3) for e in joint])
    expected = mean(evidential(joint, y, strength) for joint, y in zip(full, target, strict=True))
    uncertain = {}
    for name in names:
        here = inputs.get("mask", {}).get(name, torch.ones(7, dtype=torch.bool)).tolist()
        own = [(e, y) for e, y, h in zip(parts[name], target, here, strict=True) if h]
        expected += mean(evidential(e, y, strength) for e, y in own)
        uncertain[f"uncertainty/{name}"] = mean(3 / (sum(e) + 3) for e, _ in own)
    assert float(balancing.loss(output, inputs["target"]).detach()) == pytest.approx(expected)
    step(result, balancing, inputs)
    assert balancing.end_epoch() == pytest.approx(uncertain)


def test_labels_have_evidence_for_and_against():
    result, _, balancing = attached(task="multilabel")
    inputs = batch_for("multilabel", size=7)
    pooled = [tokens.pooled() for tokens in result.encode(inputs).values()]
    scores = [to_lists(part(f)) for part, f in zip(result.head.parts, pooled, strict=True)]
    output, expected = result.train()(inputs), []
    for i in range(7):
        for k in range(3):
            parts = [[softplus(part[i][k]), softplus(-part[i][k])] for part in scores]
            joint, outcome = dempster(*parts), 0 if inputs["target"][i, k] else 1
            expected.append(sum(evidential(e, outcome, 0.1) for e in (joint, *parts)))
            chance = (joint[0] + 1) / (sum(joint) + 2)
            assert float(output.logits[i, k].detach().sigmoid()) == pytest.approx(chance)
    assert float(balancing.loss(output, inputs["target"]).detach()) == pytest.approx(mean(expected))


def test_a_sample_without_any_modality_is_predicted_uniformly():
    result, _, balancing = attached()
    inputs = {**batch(size=3), "mask": {name: torch.zeros(3, dtype=torch.bool) for name in ("audio", "image")}}
    output = result.train()(inputs)
    torch.testing.assert_close(output.logits, torch.zeros(3, 3, dtype=torch.float64), **EXACT)
    assert bool(balancing.loss(output, inputs["target"]).isfinite())


def test_target_out_of_range_raises():
    result, _, balancing = attached()
    with pytest.raises(eq.EquipoiseError, match="class indices from 0 to"):
        balancing.loss(result.train()(batch(size=3)), torch.tensor([0, 1, 7]))


def test_errors():
    with pytest.raises(ConfigError, match=r"TMC: expected a task with classes or labels, .* got a regression"):
        eq.balance.TMC(additive_model(task="regression"))
    with pytest.raises(ConfigError, match=r"TMC: expected annealing >= 1, got annealing = 0"):
        eq.balance.TMC(additive_model(), annealing=0)
    with pytest.raises(ConfigError, match="TMC: expected a fusion whose features are the concatenated pooled vectors"):
        eq.balance.TMC(attention_model())
    model = additive_model()
    with pytest.raises(ConfigError, match="both replace the model's head"):
        eq.BalancerList(model, [eq.balance.TMC(model), eq.balance.ReconBoost(model)])
