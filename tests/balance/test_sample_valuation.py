"""Sample valuation against its equations: Shapley values, copies, both levels, every task, errors."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.common.unimodal_scores import correctness
from equipoise.errors import ConfigError
from equipoise.fusion.subset_tokens import modality_subsets, shapley_values
from helpers.fusion import DIM, NAMES, batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, assert_like_single_precision, batch_for, penalty_of, to_lists
from helpers.tolerance import TOL
from oracles.balance_b import copies_of, cross_entropy, shapley

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def subset_output(model, inputs, kept):
    """The output with the other modalities as inputs that are not there."""
    with torch.no_grad():
        return model.eval()(
            {name: value if name in (*kept, "target", "mask") else None for name, value in inputs.items()}
        )


def oracle_values(model, inputs, *, sized=False):
    """values[i][m] from one forward pass for every subset."""
    names, target = model.names, to_lists(inputs["target"])
    right = {frozenset(): [0] * len(target)}
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            scores = to_lists(subset_output(model, inputs, [names[m] for m in chosen]).logits)
            hits = [int(max(row) == row[y]) for row, y in zip(scores, target, strict=True)]
            right[frozenset(chosen)] = [hit * (size if sized else 1) for hit in hits]
    return [shapley({s: v[i] for s, v in right.items()}, len(names)) for i in range(len(target))]


def build_after_first_epoch(model, **options):
    """Returns a SampleValuation after its first epoch."""
    balancer = eq.balance.SampleValuation(model, **options)
    balancer.end_epoch()
    return balancer


def test_worked_examples():
    assert modality_subsets("abc") == [[], ["a"], ["b"], ["a", "b"], ["c"], ["a", "c"], ["b", "c"], ["a", "b", "c"]]
    # Each alone is right; only both together; the first alone, and not together.
    worth = doubles([0, 0, 0], [1, 0, 1], [1, 0, 0], [1, 1, 0])
    torch.testing.assert_close(shapley_values(worth), doubles([0.5, 0.5, 0.5], [0.5, 0.5, -0.5]), **EXACT)


@quick
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_values_equal_the_oracle_and_sum_to_the_total(count, seed):
    random = torch.Generator().manual_seed(seed)
    worth = torch.randn(2**count, 3, generator=random, dtype=torch.float64)
    result = shapley_values(worth)
    for i in range(3):
        named = {
            frozenset(chosen): float(v) for chosen, v in zip(modality_subsets(range(count)), worth[:, i], strict=True)
        }
        assert to_lists(result[:, i]) == pytest.approx(shapley(named, count), abs=1e-9)
    torch.testing.assert_close(result.sum(dim=0), worth[-1] - worth[0], **EXACT)


def test_correctness_of_every_task():
    logits = doubles([1.0, -2.0, 0.5], [0.0, 3.0, -1.0])
    assert to_lists(correctness(logits, torch.tensor([0, 2]), "classification")) == [1, 0]
    labels = doubles([1, 0, 0], [0, 1, 1])
    assert to_lists(correctness(logits, labels, "multilabel")) == pytest.approx([2 / 3, 2 / 3])
    assert to_lists(correctness(logits, logits, "regression")) == [1, 1]


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("kind", [additive_model, attention_model])
def test_values_of_a_model_equal_the_oracle(kind, number, sized):
    names = NAMES[:number]
    model, inputs = kind(names), batch(names, size=31)
    balancer = eq.balance.SampleValuation(model, value="size_correct" if sized else "correct")
    model.train()
    result = balancer.values(model(inputs), inputs["target"])
    expected = oracle_values(model, inputs, sized=sized)
    torch.testing.assert_close(result.T, doubles(*expected), **EXACT)
    assert len({round(v, 6) for row in expected for v in row}) > 2
    right = model.eval()(inputs).logits.argmax(dim=1) == inputs["target"]
    assert torch.equal(result.sum(dim=0).round(decimals=9), right.double() * (number if sized else 1))


@pytest.mark.parametrize("number", [2, 3])
def test_sample_copies_equal_the_oracle(number):
    names = NAMES[:number]
    model, inputs = attention_model(names), batch(names, size=31)
    values, target = oracle_values(model, inputs), to_lists(inputs["target"])
    total, weight = 0.0, 0
    for row, y in zip(to_lists(subset_output(model, inputs, names).logits), target, strict=True):
        total, weight = total + cross_entropy(row, y), weight + 1
    for m, name in enumerate(names):
        for row, y, value in zip(to_lists(subset_output(model, inputs, [name]).logits), target, values, strict=True):
            total, weight = total + copies_of(round(value[m], 9)) * cross_entropy(row, y), weight
            weight += copies_of(round(value[m], 9))
    assert weight > 31
    result = penalty_of(build_after_first_epoch(model), model, inputs)
    assert float(result) == pytest.approx(total / weight, rel=1e-9)


def test_lagging_modality_gets_copies():
    names = NAMES[:3]
    model, inputs = additive_model(names), batch(names, size=11)
    balancer = eq.balance.SampleValuation(model, level="modality")
    gaps = [0.9, 0.3, 0.5]
    balancer.load_state_dict({**balancer.state_dict(), "epochs": torch.tensor(1), "gaps": doubles(*gaps)})
    apart = sum(abs(a - b) for a in gaps for b in gaps) * (2 / 3) / 2
    # The largest gap adds no modality, the smallest adds all.
    kept = {names[0]: [names[0]], names[1]: list(names), names[2]: [names[0], names[2]]}
    total = sum(
        apart * float(model.loss(subset_output(model, inputs, k).logits, inputs["target"])) for k in kept.values()
    )
    plain = float(model.loss(model(inputs).logits, inputs["target"]).detach())
    expected = (plain + total) / (1 + 3 * apart)
    assert float(penalty_of(balancer, model, inputs)) == pytest.approx(expected, rel=1e-9)


def test_gaps_use_the_previous_epoch():
    model, data = additive_model(), [batch(size=11, seed=seed) for seed in range(2)]
    balancer = eq.balance.SampleValuation(model, level="modality")
    for inputs in data:
        penalty_of(balancer, model, inputs)
    result = [row for inputs in data for row in oracle_values(model, inputs)]
    means = [sum(column) / 22 for column in zip(*result, strict=True)]
    assert balancer.end_epoch() == pytest.approx({"value/audio": means[0], "value/image": means[1]})
    torch.testing.assert_close(balancer.gaps, doubles(*(1 - mean for mean in means)), **EXACT)
    # An epoch that saw nothing changes nothing.
    balancer.end_epoch()
    torch.testing.assert_close(balancer.gaps, doubles(*(1 - mean for mean in means)), **EXACT)


@pytest.mark.parametrize("level", ["sample", "modality"])
def test_first_epoch_adds_no_copies(level):
    model, inputs = attention_model(), batch(size=7)
    balancer = eq.balance.SampleValuation(model, level=level)
    assert float(penalty_of(balancer, model, inputs)) == float(
        model.loss(model(inputs).logits, inputs["target"]).detach()
    )


def test_training_modes_and_rng_state_are_restored():
    model = attention_model(fusion=eq.fusion.JointAttention(DIM, heads=2, dropout=0.5))
    inputs, balancer = batch(size=7), eq.balance.SampleValuation(model)
    output = model.train()(inputs)
    state = torch.get_rng_state()
    balancer.values(output, inputs["target"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("level", ["sample", "modality"])
def test_samples_without_the_modality_are_not_copied(level):
    model, full = additive_model(), batch(size=13, missing=("image",))
    here = full["mask"]["image"]
    balancer = build_after_first_epoch(model, level=level)
    values = balancer.values(model(full), full["target"])
    assert not bool(values[1, ~here].any())
    alone = correctness(subset_output(model, full, ["audio"]).logits, full["target"], "classification")
    torch.testing.assert_close(values[0, ~here], alone[~here].double(), **EXACT)
    gone = {**full, "image": None, "mask": {}}
    for inputs in (full, gone):
        result = step(model, eq.BalancerList(model, [balancer]), inputs)
        assert all(bool(gradient.isfinite().all()) for gradient in result.values())
    assert balancer.end_epoch()["value/image"] == pytest.approx(float(values[1].sum() / here.sum()))


@pytest.mark.parametrize("level", ["sample", "modality"])
@pytest.mark.parametrize("task", TASKS)
def test_all_tasks(task, level):
    model, inputs = attention_model(task=task), batch_for(task, size=11)
    balancer = eq.balance.SampleValuation(model, level=level)
    first = float(penalty_of(balancer, model, inputs))
    assert sum(balancer.end_epoch().values()) > 0
    assert float(penalty_of(balancer, model, inputs)) != first
    result = step(model, eq.BalancerList(model, [balancer]), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())


def test_resume_from_saved_state():
    model, inputs = additive_model(), batch(size=11)
    balancer, other = (eq.balance.SampleValuation(model, level="modality") for _ in range(2))
    penalty_of(balancer, model, inputs)
    balancer.end_epoch()
    penalty_of(balancer, model, inputs)
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    assert float(penalty_of(other, model, inputs)) == float(penalty_of(balancer, model, inputs))
    assert other.end_epoch() == balancer.end_epoch()


def test_autocast():
    model, inputs = additive_model(dtype=torch.float32), batch(dtype=torch.float32)
    balancer = build_after_first_epoch(model, level="modality")
    assert_like_single_precision(balancer, model, inputs)


def test_errors():
    with pytest.raises(ConfigError, match="SampleValuation: expected two or more modalities, got audio"):
        eq.balance.SampleValuation(attention_model(("audio",)))
    for wrong in ({"level": "batch"}, {"value": "right"}):
        with pytest.raises(ConfigError, match=f"expected level 'sample' or .* got .*{next(iter(wrong))} = "):
            eq.balance.SampleValuation(attention_model(), **wrong)
    model = attention_model()
    with pytest.raises(ConfigError, match="SampleValuation: expected an output with logits, got logits = None"):
        eq.balance.SampleValuation(model).penalty(model(batch()).with_(logits=None), batch()["target"])
