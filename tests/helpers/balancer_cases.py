"""Constructors of every balancer for the shared tests, and a typical training loop."""

import inspect
import math
from functools import partial

import torch
from torch import nn

import equipoise as eq
from equipoise import balance as package
from equipoise.balance import Balancer
from helpers.fusion import DIM, FEATURES
from helpers.steps import attention_model
from helpers.tasks import batch_for

EPOCHS, STEPS = 4, 3
BALANCERS = {
    kind.__name__: kind
    for _, kind in inspect.getmembers(package, inspect.isclass)
    if issubclass(kind, Balancer) and kind is not Balancer and not inspect.isabstract(kind)
}
"""Every balancer of the package; the shared tests run each of them."""

ALWAYS = {"beta": 0.0, "tail": None, "max_rotations": None}
SMALL = {
    "ARL": {"start": 1},
    "DataRemixing": {"warmup": 1},
    "Greedy": {"window": 2},
    "GradientBlending": {"every": 1},
    "PMR": {"fraction": 1.0},
    "ProgressiveRollingQ": ALWAYS,
    "DiagnoseRelearn": {"every": 1},
    "RollingQ": ALWAYS,
}
"""Options with which a balancer has an effect within a few small epochs."""

ATTENTION = {"RollingQ": 1, "ProgressiveRollingQ": 2}
"""Balancers of attention -> depth of the joint attention to test them with; the others use Concat."""

SIDE_BY_SIDE = {"AMCo", "MLA", "MMCosine", "QMF", "ReconBoost", "TMC"}
"""Balancers that need concatenated features or additive logits, and reject joint attention."""

CLASSES_ONLY = {"QMF", "TMC"}
"""Balancers that reject regressions."""


def joint_attention(depth=1):
    return eq.fusion.JointAttention(DIM, heads=2, depth=depth, dropout=0.0, cls_std=1.0)


def build_teachers(names, dtype):
    """Returns encoders with other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return {name: nn.Linear(FEATURES[name], DIM).to(dtype) for name in names}


def build_plain_model(name, names=("audio", "image"), *, fusion=None, **options):
    """Returns the model to test a balancer with, without the balancer.

    ``fusion()`` creates the fusion; by default joint attention for balancers of attention, otherwise Concat.
    """
    torch.manual_seed(options.get("seed", 0))
    if fusion is None:
        fusion = partial(joint_attention, ATTENTION[name]) if name in ATTENTION else partial(eq.fusion.Concat, DIM)
    heads = "train" if BALANCERS[name].needs_heads else "probe"
    return attention_model(names, fusion=fusion(), **{"unimodal": heads, **options})


def build_balancer(model, name):
    """Returns the balancer, created with the arguments that its constructor accepts."""
    kind, fusion = BALANCERS[name], model.fusion
    given = {
        "model": model, "fusion": fusion, "layer": getattr(fusion, "attention", None), "epochs": EPOCHS,
        "teachers": build_teachers(model.names, next(model.parameters()).dtype),
    }  # fmt: skip
    taken = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in given.items() if key in taken}, **SMALL.get(name, {}))


def build_with_balancer(name, names=("audio", "image"), **options):
    """Returns a model and its BalancerList."""
    model = build_plain_model(name, names, **options)
    return model, eq.BalancerList(model, [build_balancer(model, name)])


def sgd(model, balancing):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    balancing.attach_optimizer(optimizer)
    return optimizer


class Loss(nn.Module):
    """A module that returns the loss, like the training step in Lightning. DistributedDataParallel wraps it, so that
    parameters without gradient are detected."""

    def __init__(self, model, balancing):
        super().__init__()
        self.model, self.balancing = model, balancing

    def forward(self, inputs):
        return self.balancing.loss(self.model(inputs), inputs["target"])


def step(loss, balancing, optimizer, *batches):
    """Runs ``steps_per_batch`` optimizer steps over several batches, each weighted by its number of samples."""
    total = sum(len(inputs["target"]) for inputs in batches)
    for _ in range(balancing.steps_per_batch):
        optimizer.zero_grad()
        for inputs in batches:
            result = loss(inputs)
            assert bool(result.isfinite()), "a loss that is NaN or infinite"
            (result * len(inputs["target"]) / total).backward()
        balancing.before_step()
        optimizer.step()


def epoch(model, balancing, optimizer, batches, val, *, loss=None):
    """Trains for an epoch and returns the logs of the balancers; a list of batches is accumulated into one step."""
    loss = loss or Loss(model, balancing)
    steps = [inputs if isinstance(inputs, list) else [inputs] for inputs in batches]
    model.train()
    for parts in steps:
        step(loss, balancing, optimizer, *parts)
    if balancing.reviews:
        balancing.review([inputs for parts in steps for inputs in parts], val)
    return balancing.end_epoch()


def train(model, balancing, optimizer, epochs, *, task="classification", first=0, **options):
    """Trains for several epochs of small batches that depend only on the epoch number."""
    logs = []
    for number in range(first, first + epochs):
        batches = [batch_for(task, model.names, seed=10 * number + index, **options) for index in range(STEPS)]
        val = [batch_for(task, model.names, seed=500, **options)]
        logs.append(epoch(model, balancing, optimizer, batches, val))
    return logs


def eval_logits(model, task="classification", **options):
    """Returns the logits in evaluation mode."""
    with torch.no_grad():
        return model.eval()(batch_for(task, model.names, seed=77, **options)).logits


def all_finite(model, logs):
    """Returns True if all values of a log are finite."""
    values = [value for log in logs for value in log.values()]
    return all(isinstance(value, float) and math.isfinite(value) for value in values) and all(
        bool(p.isfinite().all()) and (p.grad is None or bool(p.grad.isfinite().all())) for p in model.parameters()
    )
