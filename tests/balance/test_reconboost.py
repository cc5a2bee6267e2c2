"""ReconBoost against its equations: the trained modality, the boosting loss, rectification, missing modalities,
errors.
"""

import copy

import pytest
import torch

import equipoise as eq
from equipoise.balance.reconboost import boosting_losses
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model, gradients, step
from helpers.tolerance import TOL
from oracles.balance_c import boosting

EXACT = TOL[torch.float64]
WEIGHTS = {"task_weight": 3.0, "residual": 2.0, "agreement": 0.7}


def build(
    names=("audio", "image"), *, fusion=eq.fusion.Concat, seed=0, dtype=torch.float64, unimodal="none", **options
):
    task = options.pop("task", "classification")
    model = attention_model(names, fusion=fusion(DIM), seed=seed, dtype=dtype, unimodal=unimodal, task=task)
    balancer = eq.balance.ReconBoost(model, **options)
    return model, balancer, eq.BalancerList(model, [balancer])


def modality_logits(model, inputs):
    """name -> logits of each modality's head."""
    pooled = {name: tokens.pooled() for name, tokens in model.encode(inputs).items()}
    return {name: model.head.parts[index](pooled[name]) for index, name in enumerate(model.names)}


def advance(balancer, epochs):
    for _ in range(epochs):
        balancer.end_epoch()


def test_samples_predicted_by_other_modalities_have_smaller_weight():
    # (5 - 1 * 0.25) * 2 + 0.5 * 1
    one = torch.ones(1, dtype=torch.float64)
    assert float(boosting_losses(2 * one, 0.25 * one, one)) == 10.0


def test_each_modality_is_followed_by_rectification():
    _, balancer, _ = build(NAMES[:3])
    learners = []
    for _ in range(8):
        learners.append(balancer.learner())
        balancer.end_epoch()
    assert learners == ["audio", None, "image", None, "text", None, "audio", None]


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_learner_loss_equals_the_oracle(number, turn):
    names = NAMES[:number]
    model, balancer, balancing = build(names, shrinkage=0.5, **WEIGHTS)
    advance(balancer, 2 * turn)
    inputs = batch(names, size=7)
    index = turn % number
    message = modality_logits(model, inputs)
    others = sum(scores for name, scores in message.items() if name != names[index])
    expected = boosting(
        message[names[index]].tolist(),
        others.tolist(),
        message[names[index - 1]].tolist(),
        inputs["target"].tolist(),
        0.5,
        *WEIGHTS.values(),
    )
    assert float(balancing.loss(model(inputs), inputs["target"]).detach()) == pytest.approx(expected, rel=1e-10)


def test_first_learner_has_no_agreement_term():
    model, _, balancing = build(agreement=0.0, **{k: v for k, v in WEIGHTS.items() if k != "agreement"})
    other, _, rebalancing = build(**WEIGHTS)
    inputs = batch()
    assert torch.equal(
        balancing.loss(model(inputs), inputs["target"]), rebalancing.loss(other(inputs), inputs["target"])
    )


def test_last_term_has_a_gradient():
    result = []
    for agreement in (0.0, 0.7):
        model, balancer, balancing = build(agreement=agreement)
        advance(balancer, 2)
        result.append(step(model, balancing, batch())["encoders.image.weight"])
    model, inputs = attention_model(fusion=eq.fusion.Concat(DIM), unimodal="none"), batch()
    eq.balance.ReconBoost(model)
    message = modality_logits(model, inputs)
    distance = message["image"].softmax(dim=1) - message["audio"].softmax(dim=1).detach()
    (expected,) = gradients(0.7 * distance.square().sum(dim=1).mean(), [model.encoders["image"].weight])
    torch.testing.assert_close(result[1] - result[0], expected, **EXACT)


@pytest.mark.parametrize(("epochs", "name"), [(0, "audio"), (2, "image")])
def test_only_the_trained_modality_gets_gradients(epochs, name):
    model, balancer, balancing = build()
    advance(balancer, epochs)
    index = model.names.index(name)
    learning = {f"encoders.{name}.weight", f"encoders.{name}.bias"}
    learning |= {f"head.parts.{index}.weight", f"head.parts.{index}.bias"}
    assert set(step(model, balancing, batch())) == learning


def test_rectification_trains_all_modules():
    model, balancer, balancing = build(shrinkage=0.5)
    advance(balancer, 1)
    inputs = batch()
    output = model(inputs)
    torch.testing.assert_close(output.logits, 0.5 * sum(modality_logits(model, inputs).values()), **EXACT)
    loss = balancing.loss(output, inputs["target"])
    torch.testing.assert_close(loss, model.loss(output.logits, inputs["target"]), **EXACT)
    result = step(model, balancing, inputs)
    assert set(result) == {name for name, _ in model.named_parameters()}
    assert float(result["head.shrinkage"]) != 0.0


def test_logits_exclude_missing_modalities():
    model, _, _ = build(shrinkage=0.5)
    inputs = batch(size=3, missing=("audio",))
    message, has = modality_logits(model, inputs), inputs["mask"]["audio"]
    expected = 0.5 * (message["image"] + torch.where(has[:, None], message["audio"], 0.0))
    torch.testing.assert_close(model(inputs).logits, expected, **EXACT)


def test_samples_without_the_learner_modality_are_excluded():
    model, balancer, balancing = build()
    inputs = batch(size=7, missing=("audio",))
    kept = inputs["mask"]["audio"].nonzero()[:, 0]
    part = {name: value[kept] for name, value in inputs.items() if name != "mask"}
    full = balancing.loss(model(inputs), inputs["target"])
    torch.testing.assert_close(full, balancing.loss(model(part), part["target"]), **EXACT)
    assert balancer.learner() == "audio"


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_modality_missing_from_all_samples(epochs):
    model, balancer, balancing = build(NAMES[:3])
    advance(balancer, epochs)
    result = step(model, balancing, {**batch(NAMES[:3]), "audio": None})
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())
    assert "encoders.audio.weight" not in result


@pytest.mark.parametrize("epochs", [0, 1])
def test_accumulated_batches_equal_one_large_batch(epochs):
    full = batch(size=12)
    model, balancer, balancing = build()
    advance(balancer, epochs)
    large, small = step(model, balancing, full), step(model, balancing, *split_batch(full, 5, 3, 4))
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, **EXACT)


@pytest.mark.parametrize("unimodal", ["probe", "train"])
def test_unimodal_heads_are_detached(unimodal):
    model, _, balancing = build(unimodal=unimodal)
    result = step(model, balancing, batch())
    assert "unimodal_heads.image.weight" in result
    assert "encoders.image.weight" not in result


def test_resumed_training_equals_uninterrupted_training():
    model, balancer, _ = build()
    advance(balancer, 2)
    fresh, other, rebalancing = build(seed=9)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    inputs = batch()
    assert other.learner() == "image"
    straight = eq.BalancerList(model, [balancer]).loss(model(inputs), inputs["target"])
    assert torch.equal(rebalancing.loss(fresh(inputs), inputs["target"]), straight)
    assert other.end_epoch() == {"shrinkage": pytest.approx(0.01)}


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_all_tasks(task, epochs):
    model, balancer, balancing = build(task=task)
    advance(balancer, epochs)
    inputs = batch()
    inputs["target"] = torch.nn.functional.one_hot(inputs["target"], 3).double()
    result = step(model, balancing, inputs)
    assert float(result["encoders.image.weight"].abs().max()) > 0
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_autocast(epochs):
    model, balancer, balancing = build(dtype=torch.float32)
    advance(balancer, epochs)
    inputs = batch(dtype=torch.float32)
    exact = balancing.loss(model(inputs), inputs["target"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = balancing.loss(model(inputs), inputs["target"])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, **TOL[torch.bfloat16])


def test_errors():
    with pytest.raises(ConfigError, match="ReconBoost: expected two or more modalities, got audio"):
        eq.balance.ReconBoost(attention_model(("audio",), fusion=eq.fusion.Concat(DIM)))
    with pytest.raises(ConfigError, match=r"ReconBoost: expected a fusion whose features .*, got JointAttention"):
        eq.balance.ReconBoost(attention_model())
    for wrong in ({"residual": 5.0}, {"residual": -1.0}, {"agreement": -1.0}, {"shrinkage": 0.0}):
        with pytest.raises(ConfigError, match=r"ReconBoost: expected task_weight > residual >= 0, agreement >= 0"):
            build(**wrong)
    model, balancer, _ = build()
    balancer.end_epoch()
    with pytest.raises(ConfigError, match="expected an output with logits, got logits = None"):
        balancer.penalty(model(batch()).with_(logits=None), batch()["target"])


@pytest.mark.parametrize("other", ["MBSD", "MMPareto"])
def test_balancers_that_need_trained_heads_raise(other):
    model = attention_model(fusion=eq.fusion.Concat(DIM))
    with pytest.raises(ConfigError, match=f"ReconBoost with {other}: it needs unimodal heads that train the encoders"):
        eq.BalancerList(model, [getattr(eq.balance, other)(model), eq.balance.ReconBoost(model)])
