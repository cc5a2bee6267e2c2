"""A battery over every balancer that the package has, in a training loop as users write it."""

import copy
import gc
import inspect
import math
from functools import partial
from itertools import combinations
from typing import ClassVar

import pytest
import torch

import equipoise as eq
from equipoise.balance import Balancer
from equipoise.balance.balancer_list import _joined
from equipoise.errors import ConfigError
from helpers import balancer_cases as cases
from helpers.balancer_cases import (
    ATTENTION,
    BALANCERS,
    EPOCHS,
    all_finite,
    build_balancer,
    build_plain_model,
    build_with_balancer,
    epoch,
    eval_logits,
    sgd,
    train,
)
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.fusion_cases import FUSIONS
from helpers.tasks import TASKS, batch_for
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
every = pytest.mark.parametrize("name", sorted(BALANCERS))
of_models = pytest.mark.parametrize("name", sorted(set(BALANCERS) - set(ATTENTION)))
everywhere = pytest.mark.parametrize(
    ("name", "fusion"),
    [(name, None) for name in sorted(BALANCERS)]
    + [(name, cases.joint_attention) for name in sorted(set(BALANCERS) - set(ATTENTION) - cases.SIDE_BY_SIDE)],
)
"""Each on the fusion that suits it, and on joint attention."""

ADDS = {
    "AMCo": "a linear map behind the head",
    "ConsistencyBalancer": "the concepts",
    "Greedy": "the gates between modalities",
    "MLA": "a head that modalities share",
    "MMCosine": "class vectors in place of a linear head",
    "QMF": "a head for each modality",
    "ReconBoost": "a head for each modality, and their shrinkage",
    "TMC": "a head for each modality",
}
"""Balancers that change the model's parameters, and by what."""

MICRO_BATCHES = {
    "CGGM": "gradients of heads are compared on each batch",
    "ModalityCorruption": "noise is drawn for each batch",
    "ModalityDropout": "unimodal heads average over the samples that were left a modality",
    "OPM": "unimodal heads average over the samples that were left a modality",
    "PMR": "prototype weights are decided on each batch",
    "QMF": "samples are ranked in each batch",
    "SampleValuation": "copies are counted for each batch",
}
"""Balancers for which accumulated batches are not one large batch, and why."""


def test_tables_of_tests_list_existing_balancers():
    for table in (ADDS, MICRO_BATCHES, ATTENTION, cases.SIDE_BY_SIDE, cases.SMALL, cases.CLASSES_ONLY):
        assert set(table) <= set(BALANCERS)


@every
@pytest.mark.parametrize("number", [2, 3, 5])
def test_trains_with_any_number_of_modalities(name, number):
    model, balancing = build_with_balancer(name, NAMES[:number])
    before = eval_logits(model)
    logs = train(model, balancing, sgd(model, balancing), 2)
    assert all_finite(model, logs)
    assert not torch.equal(eval_logits(model), before)


@every
def test_training_keeps_no_tensors_of_earlier_steps(name):
    model, balancing = build_with_balancer(name)
    optimizer = sgd(model, balancing)
    batches, val = split_batch(batch(size=8), 4, 4), [batch(size=4, seed=1)]
    counts = []
    for _ in range(5):
        epoch(model, balancing, optimizer, batches, val)
        gc.collect()
        if not counts:
            # Only objects of later epochs are counted.
            gc.freeze()
        counts.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
    # Some balancers create tensors in the third epoch.
    assert counts[4] <= counts[2]


@every
def test_single_modality_raises(name):
    with pytest.raises(ConfigError, match=r"expected .*two or more modalities, got"):
        build_with_balancer(name, ("audio",))


def refuses(name, task, **options):
    """Whether the balancer is defined for classes alone; checks that it then rejects a regression with the reason."""
    if name not in cases.CLASSES_ONLY or task != "regression":
        return False
    with pytest.raises(
        ConfigError, match=f"{name}: expected a task with classes or labels, .* got a regression.*Choose"
    ):
        build_with_balancer(name, task=task, **options)
    return True


@everywhere
@pytest.mark.parametrize("task", TASKS)
def test_all_tasks(name, fusion, task):
    if refuses(name, task):
        return
    model, balancing = build_with_balancer(name, fusion=fusion, task=task)
    before = eval_logits(model, task)
    logs = train(model, balancing, sgd(model, balancing), 2, task=task)
    assert all_finite(model, logs)
    assert not torch.equal(eval_logits(model, task), before)


@every
def test_one_output(name):
    """A regression whose targets are (batch,)."""
    if refuses(name, "regression", outputs=1):
        return
    model, balancing = build_with_balancer(name, task="regression", outputs=1)
    optimizer = sgd(model, balancing)
    batches = [{**batch(seed=seed), "target": torch.linspace(-1, 1, 5)} for seed in range(3)]
    logs = [epoch(model, balancing, optimizer, batches[:2], batches[2:]) for _ in range(2)]
    assert all_finite(model, logs)


@everywhere
@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_resumed_training_equals_uninterrupted_training(name, fusion, stop):
    model, balancing = build_with_balancer(name, fusion=fusion)
    optimizer = sgd(model, balancing)
    train(model, balancing, optimizer, stop)
    states = copy.deepcopy([part.state_dict() for part in (model, *balancing.balancers, optimizer)])
    fresh, other = build_with_balancer(name, fusion=fusion, seed=9)
    fresh_optimizer = sgd(fresh, other)
    for part, state in zip((fresh, *other.balancers, fresh_optimizer), states, strict=True):
        part.load_state_dict(state)
    assert torch.equal(eval_logits(fresh), eval_logits(model))
    straight = train(model, balancing, optimizer, EPOCHS - stop, first=stop)
    resumed = train(fresh, other, fresh_optimizer, EPOCHS - stop, first=stop)
    assert resumed == straight
    assert torch.equal(eval_logits(fresh), eval_logits(model))


@every
def test_state_contains_tensors_and_no_own_parameters(name):
    model, balancing = build_with_balancer(name)
    train(model, balancing, sgd(model, balancing), 1)
    for part in (model, *balancing.balancers):
        assert all(isinstance(value, torch.Tensor) for value in part.state_dict().values())
    # An optimizer is made of the model's parameters, and knows no others.
    assert not [n for b in balancing.balancers for n, p in b.named_parameters() if p.requires_grad]


@everywhere
def test_accumulated_batches_equal_one_large_batch(name, fusion):
    result = []
    for sizes in ((12,), (5, 3, 4)):
        model, balancing = build_with_balancer(name, fusion=fusion)
        optimizer = sgd(model, balancing)
        logs = []
        for number in range(3):
            batches = [split_batch(batch(size=12, seed=10 * number + index), *sizes) for index in range(2)]
            logs.append(epoch(model, balancing, optimizer, batches, [batch(seed=500)]))
        result.append((list(model.parameters()), logs))
    (one, message), (other, repeated) = result
    if name in MICRO_BATCHES:
        assert not all(torch.allclose(a, b, **EXACT) for a, b in zip(one, other, strict=True))
        return
    torch.testing.assert_close(other, one, **EXACT)
    for log, again in zip(message, repeated, strict=True):
        assert again == pytest.approx(log, rel=1e-5, abs=1e-6)


@everywhere
@pytest.mark.parametrize("masked", [False, True])
def test_modality_missing_from_samples_and_from_a_batch(name, fusion, masked):
    model, balancing = build_with_balancer(name, NAMES[:3], fusion=fusion)
    optimizer = sgd(model, balancing)
    some = batch(NAMES[:3], size=7, missing=("audio", "image"))
    gone = {"mask": {"text": torch.zeros(5, dtype=torch.bool)}} if masked else {"text": None}
    none = {**batch(NAMES[:3], seed=1), **gone}
    logs = [epoch(model, balancing, optimizer, [some, none, [none, some]], [none, some]) for _ in range(3)]
    assert all_finite(model, logs)


@every
def test_modality_missing_from_all_batches(name):
    model, balancing = build_with_balancer(name, NAMES[:3])
    optimizer = sgd(model, balancing)
    batches = [{**batch(NAMES[:3], seed=seed), "image": None} for seed in range(3)]
    logs = [epoch(model, balancing, optimizer, batches[:2], batches[2:]) for _ in range(3)]
    # What is not known of it may be said to be NaN, and of nothing else.
    assert all_finite(model, [{key: value for key, value in log.items() if not key.endswith("/image")} for log in logs])


@everywhere
def test_autocast(name, fusion):
    model, balancing = build_with_balancer(name, fusion=fusion, dtype=torch.float32)
    optimizer = sgd(model, balancing)
    with torch.autocast("cpu", torch.bfloat16):
        logs = train(model, balancing, optimizer, 2, dtype=torch.float32)
    assert all_finite(model, logs)


@every
def test_frozen_encoder(name):
    model, balancing = build_with_balancer(name)
    model.encoders["audio"].requires_grad_(False)
    before = copy.deepcopy(model.encoders["audio"].state_dict())
    logs = train(model, balancing, sgd(model, balancing), 2)
    assert all_finite(model, logs)
    assert all(torch.equal(value, before[key]) for key, value in model.encoders["audio"].state_dict().items())


@every
def test_global_rng_is_not_used(name):
    model, balancing = build_with_balancer(name)
    optimizer = sgd(model, balancing)
    state = torch.get_rng_state()
    train(model, balancing, optimizer, 2)
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_end_epoch_does_not_change_gradients(name):
    model, balancing = build_with_balancer(name)
    optimizer = sgd(model, balancing)
    train(model, balancing, optimizer, 1)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    mode = model.training
    balancing.review([batch(seed=1)], [batch(seed=2)])
    balancing.end_epoch()
    assert model.training is mode
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient)


@every
def test_evaluation_is_not_observed(name):
    result = []
    for looks in (False, True):
        model, balancing = build_with_balancer(name)
        optimizer = sgd(model, balancing)
        logs = []
        for number in range(3):
            logs += train(model, balancing, optimizer, 1, first=number)
            if looks:
                eval_logits(model, size=7)
                model.train()
                with torch.no_grad():
                    model.eval()(batch(seed=3))
        result.append((logs, eval_logits(model)))
    assert result[0][0] == result[1][0]
    assert torch.equal(result[0][1], result[1][1])


@every
def test_deep_copy_of_the_model_is_independent(name):
    """As averaged weights are kept."""
    model, balancing = build_with_balancer(name)
    optimizer = sgd(model, balancing)
    train(model, balancing, optimizer, 1)
    before = eval_logits(model)
    twin = copy.deepcopy(model)
    train(model, balancing, optimizer, 1, first=1)
    assert torch.equal(eval_logits(twin), before)
    assert not torch.equal(eval_logits(model), before)


@every
def test_parameters_of_the_model(name):
    model, _ = build_with_balancer(name)
    shapes = {key: value.shape for key, value in model.named_parameters()}
    expected = {key: value.shape for key, value in build_plain_model(name).named_parameters()}
    assert (shapes != expected) is (name in ADDS)


def training_error(model, names):
    """The error with which balancers refuse a model; None where they have trained on it."""
    try:
        balancing = eq.BalancerList(model, [build_balancer(model, name) for name in names])
        logs = train(model, balancing, sgd(model, balancing), 1)
    except ConfigError as error:
        return error
    assert all_finite(model, logs), names
    return None


@of_models
def test_every_fusion_trains_or_raises_with_reason(name):
    """A balancer trains with a fusion, or raises an error with the reason."""
    reasons = {}
    for key, kind in FUSIONS.items():
        still = {"dropout": 0.0} if "dropout" in inspect.signature(kind).parameters else {}
        reasons[key] = training_error(build_plain_model(name, fusion=partial(kind, DIM, **still)), [name])
    assert reasons["Concat"] is None
    assert (reasons["JointAttention"] is not None) is (name in cases.SIDE_BY_SIDE)
    assert all(error is None or (error.who.startswith(name) and error.fix) for error in reasons.values())


@every
def test_balancer_pairs_train_or_raise_with_reason(name):
    for other in sorted(BALANCERS):
        if other > name:
            host = next((each for each in (name, other) if each in ATTENTION), name)
            error = training_error(build_plain_model(host, unimodal="train"), [name, other])
            assert error is None or error.fix, other


class MultiStep(Balancer):
    steps_per_batch = 2


class LossReplacing(Balancer):
    replaces = ("task",)


class Conflicting(Balancer):
    excludes: ClassVar = {"MultiStep": "there is no turn to take"}


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (
            (MultiStep, MultiStep),
            "got MultiStep and MultiStep, which both take several steps on each batch. Leave one of them out",
        ),
        ((LossReplacing, LossReplacing), "both replace the task loss"),
        ((MultiStep, Conflicting), "got Conflicting with MultiStep: there is no turn to take. Leave one of them out"),
        ((Conflicting, MultiStep), "got Conflicting with MultiStep: there is no turn to take"),
    ],
)
def test_conflict_errors_give_the_reason(kinds, message):
    with pytest.raises(ConfigError, match=f"BalancerList: expected balancers that can be combined, .*{message}"):
        eq.BalancerList(build_plain_model("RollingQ"), [kind() for kind in kinds])


def test_compatible_balancers_can_be_combined():
    for kinds in combinations((MultiStep, LossReplacing), 2):
        assert eq.BalancerList(build_plain_model("RollingQ"), [kind() for kind in kinds]).steps_per_batch == 2


def test_base_class_changes_nothing():
    balancer, features = Balancer(), {"audio": torch.ones(2, 3)}
    output = eq.Output(features=torch.ones(2, 3))
    target = torch.zeros(2)
    assert balancer.transform(features) is features
    assert balancer.observe(output, target) is None
    assert balancer.penalty(output, target) is None
    assert balancer.gradient_scale(output, target) is None
    assert balancer.before_step() is None
    assert balancer.review([], []) is None
    assert balancer.end_epoch() == {}


def test_batches_of_each_task_differ():
    """Checks that the battery over tasks can fail."""
    kinds = {task: batch_for(task)["target"].dtype for task in TASKS}
    assert kinds == {"classification": torch.int64, "multilabel": torch.float64, "regression": torch.float64}


def test_joined_step_keeps_class_token_of_modality_missing_from_first_batch():
    random = torch.Generator().manual_seed(0)
    full = eq.Tokens(torch.randn(2, 5, 3, generator=random), cls=True)
    lacking = eq.Tokens(torch.zeros(2, 0, 3))
    outputs = [eq.Output(features=torch.zeros(2, 3), tokens={"audio": part}) for part in (lacking, full)]
    output, _ = _joined([(each, torch.zeros(2)) for each in outputs])
    assert torch.equal(output.tokens["audio"].pooled(), torch.cat([torch.zeros(2, 3), full.values[:, 0]]))


def test_new_balancer_list_replaces_earlier_one():
    model = build_plain_model("RollingQ")
    model.transforms = mine = [lambda tokens, target: tokens]
    eq.BalancerList(model, [eq.balance.ModalityDropout(model), eq.balance.ModalityCorruption(model)])
    assert (len(model.transforms), len(model.preparations)) == (2, 1)
    eq.BalancerList(model, [])
    assert (model.transforms, model.preparations) == (mine, [])


@pytest.mark.parametrize(("kind", "index"), [("ModalityDropout", "transforms"), ("ModalityCorruption", "preparations")])
def test_model_that_never_calls_the_balancer_raises(kind, index):
    model = build_plain_model("RollingQ")
    balancer = getattr(eq.balance, kind)(model)
    delattr(model, index)
    with pytest.raises(
        ConfigError, match=f"calls its {index} .*, for {kind}, got FusionModel, which has no such list.*= "
    ):
        eq.BalancerList(model, [balancer])
    assert eq.BalancerList(model, [eq.balance.CML(model)]).steps_per_batch == 1


@pytest.mark.parametrize("fill", [math.nan, math.inf])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", [name for name, kind in BALANCERS.items() if kind.reviews])
def test_non_finite_review_sample_has_no_effect(name, split, fill):
    model, balancing = build_with_balancer(name)
    optimizer = sgd(model, balancing)
    train(model, balancing, optimizer, 1)
    data = {key: [batch_for("classification", model.names, seed=seed)] for key, seed in (("train", 0), ("val", 500))}
    odd = batch_for("classification", model.names, seed=5)
    odd[model.names[0]][0] = fill
    data[split].insert(0, odd)
    balancing.review(data["train"], data["val"])
    logs = [balancing.end_epoch(), *train(model, balancing, optimizer, 2, first=1)]
    assert all_finite(model, logs)
    assert all(bool(state.isfinite().all()) for b in balancing.balancers for state in b.state_dict().values())
