"""Data remixing against its equations: assignment, losses, warm-up, missing modalities, tasks, errors."""

import pytest
import torch

import equipoise as eq
from equipoise.balance.data_remixing import hardest_modality
from equipoise.errors import ConfigError
from equipoise.fusion.subset_tokens import keep_modalities
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model, step
from helpers.tasks import batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_d import cross_entropy, entropy, remixed
from oracles.plain import mean

EXACT = TOL[torch.float64]
JOINT = {"heads": 2, "dropout": 0.0, "cls_std": 1.0}


def attached(names=("audio", "image"), *, joint=False, warmup=0, gamma=1.0, **options):
    fusion = eq.fusion.JointAttention(DIM, **JOINT) if joint else eq.fusion.Concat(DIM)
    model = attention_model(names, fusion=fusion, **{"unimodal": "none", **options})
    return model, eq.BalancerList(model, [eq.balance.DataRemixing(model, warmup=warmup, gamma=gamma)])


def alone(model, inputs):
    """Returns the logits from each modality alone, without the balancer."""
    with torch.no_grad():
        tokens = model.encode(inputs)
        return [model.fuse(keep_modalities(tokens, [name])).logits for name in model.names]


def shown(output):
    return torch.stack([output.tokens[name].present() for name in output.names], dim=1).tolist()


def test_the_hardest_modality_is_one_that_the_sample_has():
    difficulty = torch.tensor([[0.3, 0.9, 0.5], [0.3, 0.9, 0.5], [0.4, 0.4, 0.1]])
    present = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    assert hardest_modality(difficulty, present).tolist() == [1, 2, 0]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("number", [2, 3])
def test_each_sample_is_trained_on_its_hardest_modality(joint, number):
    names = NAMES[:number]
    result, balancing = attached(names, joint=joint)
    inputs = batch(names, size=13)
    single, target = [to_lists(part) for part in alone(result, inputs)], inputs["target"].tolist()
    chosen = remixed(single)
    assert len(set(chosen)) > 1
    output = result.train()(inputs)
    assert shown(output) == [[m == own for m in range(number)] for own in chosen]
    expected = mean(cross_entropy(single[m][i], target[i]) for i, m in enumerate(chosen))
    assert float(balancing.loss(output, inputs["target"]).detach()) == pytest.approx(expected)
    step(result, balancing, inputs)
    log = {f"assigned/{name}": chosen.count(m) / 13 for m, name in enumerate(names)}
    assert balancing.end_epoch() == pytest.approx(log)
    assert set(balancing.end_epoch().values()) == {0.0}


@pytest.mark.parametrize("name", ["audio", "image"])
def test_encoders_learn_from_their_own_samples_only(name):
    result, balancing = attached()
    inputs = batch(size=13)
    index = result.names.index(name)
    members = torch.tensor([m == index for m in remixed([to_lists(part) for part in alone(result, inputs)])])
    actual = step(result, balancing, inputs)
    tokens = result.encode(inputs)
    logits = result.fuse(keep_modalities(tokens, [name])).logits
    loss = result.sample_losses(logits, inputs["target"])[members].sum() / 13
    (expected,) = torch.autograd.grad(loss, result.encoders[name].weight)
    torch.testing.assert_close(actual[f"encoders.{name}.weight"], expected, **EXACT)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_heads_learn_the_assigned_samples(gamma):
    result, balancing = attached(unimodal="train", gamma=gamma)
    inputs = batch(size=13)
    target = inputs["target"]
    single = alone(result, inputs)
    chosen = remixed([to_lists(part) for part in single])
    heads = [result.unimodal_heads[n](tokens.pooled()) for n, tokens in result.encode(inputs).items()]
    task = result.loss(torch.stack([single[m][i] for i, m in enumerate(chosen)]), target)
    own = result.loss(torch.stack([heads[m][i] for i, m in enumerate(chosen)]), target)
    torch.testing.assert_close(balancing.loss(result.train()(inputs), target), task + gamma * own, **EXACT)


def test_no_modality_is_masked_during_warmup():
    result, balancing = attached(warmup=1, unimodal="train", gamma=2.0)
    inputs = batch(size=13)
    output = result.train()(inputs)
    heads = sum(result.loss(logits, inputs["target"]) for logits in output.unimodal_logits.values())
    expected = result.loss(output.logits, inputs["target"]) + 2.0 * heads
    torch.testing.assert_close(balancing.loss(output, inputs["target"]), expected, **EXACT)
    torch.testing.assert_close(output.logits, result.eval()(inputs).logits, **EXACT)
    assert set(balancing.end_epoch().values()) == {0.0}
    assert sum(map(sum, shown(result.train()(inputs)))) == 13


@pytest.mark.parametrize("unimodal", ["none", "train"])
def test_accumulated_batches_equal_one_large_batch(unimodal):
    result, balancing = attached(unimodal=unimodal)
    full = batch(size=12, missing=("image",))
    large, small = step(result, balancing, full), step(result, balancing, *split_batch(full, 5, 3, 4))
    for key, gradient in large.items():
        torch.testing.assert_close(small[key], gradient, **EXACT)


def test_in_a_regression_the_largest_error_is_the_hardest():
    result, _ = attached(task="regression")
    inputs = batch_for("regression", size=13)
    errors = torch.stack([(p - inputs["target"]).square().mean(dim=1) for p in alone(result, inputs)], dim=1)
    tokens = result.train()(inputs).tokens
    assert tokens["image"].present().tolist() == (errors[:, 1] > errors[:, 0]).tolist()
    with pytest.raises(ConfigError, match=r"DataRemixing: expected batch\['target'\] for a regression, got none"):
        result({name: inputs[name] for name in result.names})


def test_labels_are_assigned_by_the_entropy_of_all():
    result, _ = attached(task="multilabel")
    inputs = batch_for("multilabel", size=13)
    actual = [[sum(entropy([y, 0.0]) for y in row) for row in to_lists(part)] for part in alone(result, inputs)]
    tokens = result.train()(inputs).tokens
    assert tokens["image"].present().tolist() == [b > a for a, b in zip(*actual, strict=True)]


def test_evaluation_hides_nothing():
    result, balancing = attached()
    inputs = batch(size=7)
    output = result.eval()(inputs)
    assert all(bool(part.present().all()) for part in output.tokens.values())
    loss = balancing.loss(output, inputs["target"])
    torch.testing.assert_close(loss, result.loss(output.logits, inputs["target"]), **EXACT)


def test_errors():
    for wrong in ({"warmup": -1}, {"gamma": -1.0}):
        with pytest.raises(ConfigError, match="DataRemixing: expected warmup >= 0 and gamma >= 0, got warmup = "):
            eq.balance.DataRemixing(attention_model(), **wrong)
    model = attention_model(unimodal="train")
    with pytest.raises(ConfigError, match="DataRemixing and GradientBlending, which both replace the unimodal loss"):
        eq.BalancerList(model, [eq.balance.DataRemixing(model), eq.balance.GradientBlending(model)])
