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
    made = attention_model(names, fusion=fusion(DIM), seed=seed, dtype=dtype, unimodal=unimodal, task=task)
    balancer = eq.balance.ReconBoost(made, **options)
    return made, balancer, eq.BalancerList(made, [balancer])


def modality_logits(made, inputs):
    """name -> logits of each modality's head."""
    pooled = {name: tokens.pooled() for name, tokens in made.encode(inputs).items()}
    return {name: made.head.parts[place](pooled[name]) for place, name in enumerate(made.names)}


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
    made, balancer, balancing = build(names, shrinkage=0.5, **WEIGHTS)
    advance(balancer, 2 * turn)
    inputs = batch(names, size=7)
    place = turn % number
    said = modality_logits(made, inputs)
    others = sum(scores for name, scores in said.items() if name != names[place])
    expected = boosting(
        said[names[place]].tolist(), others.tolist(), said[names[place - 1]].tolist(), inputs["target"].tolist(), 0.5,
        *WEIGHTS.values(),
    )  # fmt: skip
    assert float(balancing.loss(made(inputs), inputs["target"]).detach()) == pytest.approx(expected, rel=1e-10)


def test_first_learner_has_no_agreement_term():
    made, _, balancing = build(agreement=0.0, **{k: v for k, v in WEIGHTS.items() if k != "agreement"})
    other, _, rebalancing = build(**WEIGHTS)
    inputs = batch()
    assert torch.equal(
        balancing.loss(made(inputs), inputs["target"]), rebalancing.loss(other(inputs), inputs["target"])
    )


def test_last_term_has_a_gradient():
    found = []
    for agreement in (0.0, 0.7):
        made, balancer, balancing = build(agreement=agreement)
        advance(balancer, 2)
        found.append(step(made, balancing, batch())["encoders.image.weight"])
    made, inputs = attention_model(fusion=eq.fusion.Concat(DIM), unimodal="none"), batch()
    eq.balance.ReconBoost(made)
    said = modality_logits(made, inputs)
    distance = said["image"].softmax(dim=1) - said["audio"].softmax(dim=1).detach()
    (expected,) = gradients(0.7 * distance.square().sum(dim=1).mean(), [made.encoders["image"].weight])
    torch.testing.assert_close(found[1] - found[0], expected, **EXACT)


@pytest.mark.parametrize(("epochs", "name"), [(0, "audio"), (2, "image")])
def test_only_the_trained_modality_gets_gradients(epochs, name):
    made, balancer, balancing = build()
    advance(balancer, epochs)
    place = made.names.index(name)
    learning = {f"encoders.{name}.weight", f"encoders.{name}.bias"}
    learning |= {f"head.parts.{place}.weight", f"head.parts.{place}.bias"}
    assert set(step(made, balancing, batch())) == learning


def test_rectification_trains_all_modules():
    made, balancer, balancing = build(shrinkage=0.5)
    advance(balancer, 1)
    inputs = batch()
    output = made(inputs)
    torch.testing.assert_close(output.logits, 0.5 * sum(modality_logits(made, inputs).values()), **EXACT)
    loss = balancing.loss(output, inputs["target"])
    torch.testing.assert_close(loss, made.loss(output.logits, inputs["target"]), **EXACT)
    found = step(made, balancing, inputs)
    assert set(found) == {name for name, _ in made.named_parameters()}
    assert float(found["head.shrinkage"]) != 0.0


def test_logits_exclude_missing_modalities():
    made, _, _ = build(shrinkage=0.5)
    inputs = batch(size=3, missing=("audio",))
    said, has = modality_logits(made, inputs), inputs["mask"]["audio"]
    expected = 0.5 * (said["image"] + torch.where(has[:, None], said["audio"], 0.0))
    torch.testing.assert_close(made(inputs).logits, expected, **EXACT)


def test_samples_without_the_learner_modality_are_excluded():
    made, balancer, balancing = build()
    inputs = batch(size=7, missing=("audio",))
    kept = inputs["mask"]["audio"].nonzero()[:, 0]
    part = {name: value[kept] for name, value in inputs.items() if name != "mask"}
    whole = balancing.loss(made(inputs), inputs["target"])
    torch.testing.assert_close(whole, balancing.loss(made(part), part["target"]), **EXACT)
    assert balancer.learner() == "audio"


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_modality_missing_from_all_samples(epochs):
    made, balancer, balancing = build(NAMES[:3])
    advance(balancer, epochs)
    found = step(made, balancing, {**batch(NAMES[:3]), "audio": None})
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    assert "encoders.audio.weight" not in found


@pytest.mark.parametrize("epochs", [0, 1])
def test_accumulated_batches_equal_one_large_batch(epochs):
    whole = batch(size=12)
    made, balancer, balancing = build()
    advance(balancer, epochs)
    large, small = step(made, balancing, whole), step(made, balancing, *split_batch(whole, 5, 3, 4))
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, **EXACT)


@pytest.mark.parametrize("unimodal", ["probe", "train"])
def test_unimodal_heads_are_detached(unimodal):
    made, _, balancing = build(unimodal=unimodal)
    found = step(made, balancing, batch())
    assert "unimodal_heads.image.weight" in found
    assert "encoders.image.weight" not in found


def test_resumed_training_equals_uninterrupted_training():
    made, balancer, _ = build()
    advance(balancer, 2)
    fresh, other, rebalancing = build(seed=9)
    fresh.load_state_dict(copy.deepcopy(made.state_dict()))
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    inputs = batch()
    assert other.learner() == "image"
    straight = eq.BalancerList(made, [balancer]).loss(made(inputs), inputs["target"])
    assert torch.equal(rebalancing.loss(fresh(inputs), inputs["target"]), straight)
    assert other.end_epoch() == {"shrinkage": pytest.approx(0.01)}


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_all_tasks(task, epochs):
    made, balancer, balancing = build(task=task)
    advance(balancer, epochs)
    inputs = batch()
    inputs["target"] = torch.nn.functional.one_hot(inputs["target"], 3).double()
    found = step(made, balancing, inputs)
    assert float(found["encoders.image.weight"].abs().max()) > 0
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_autocast(epochs):
    made, balancer, balancing = build(dtype=torch.float32)
    advance(balancer, epochs)
    inputs = batch(dtype=torch.float32)
    exact = balancing.loss(made(inputs), inputs["target"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = balancing.loss(made(inputs), inputs["target"])
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
    made, balancer, _ = build()
    balancer.end_epoch()
    with pytest.raises(ConfigError, match="expected an output with logits, got logits = None"):
        balancer.penalty(made(batch()).with_(logits=None), batch()["target"])


@pytest.mark.parametrize("other", ["MBSD", "MMPareto"])
def test_balancers_that_need_trained_heads_raise(other):
    made = attention_model(fusion=eq.fusion.Concat(DIM))
    with pytest.raises(ConfigError, match=f"ReconBoost with {other}: it needs unimodal heads that train the encoders"):
        eq.BalancerList(made, [getattr(eq.balance, other)(made), eq.balance.ReconBoost(made)])
