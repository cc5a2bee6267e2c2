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
from helpers.steps import fused
from helpers.tasks import batch_for

EPOCHS, STEPS = 4, 3
BALANCERS = {
    kind.__name__: kind
    for _, kind in inspect.getmembers(package, inspect.isclass)
    if issubclass(kind, Balancer) and kind is not Balancer and not inspect.isabstract(kind)
}
"""Every balancer of the package: whoever adds one meets every test of the batteries."""

ALWAYS = {"beta": 0.0, "tail": None, "max_rotations": None}
SMALL = {
    "Greedy": {"window": 2},
    "GradientBlending": {"every": 1},
    "PMR": {"fraction": 1.0},
    "ProgressiveRollingQ": ALWAYS,
    "DiagnoseRelearn": {"every": 1},
    "RollingQ": ALWAYS,
}
"""Options with which a balancer does within a few small epochs what it is there for."""

ATTENTION = {"RollingQ": 1, "ProgressiveRollingQ": 2}
"""Balancers of attention, which are tried on joint attention of that depth; the others on Concat."""

SIDE_BY_SIDE = {"AMCo", "MLA", "MMCosine", "ReconBoost"}
"""Balancers whose idea needs vectors that stand side by side, or logits that add up, so they refuse joint attention."""


def joint(depth=1):
    return eq.fusion.JointAttention(DIM, heads=2, depth=depth, dropout=0.0, cls_std=1.0)


def teachers(names, dtype):
    """Encoders that know something else."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return {name: nn.Linear(FEATURES[name], DIM).to(dtype) for name in names}


def plain(name, names=("audio", "image"), *, fusion=None, **options):
    """The model that a balancer is tried on, without the balancer.

    ``fusion`` is called for one; by default it is joint attention for balancers of attention, else Concat.
    """
    torch.manual_seed(options.get("seed", 0))
    if fusion is None:
        fusion = partial(joint, ATTENTION[name]) if name in ATTENTION else partial(eq.fusion.Concat, DIM)
    heads = "train" if BALANCERS[name].needs_heads else "probe"
    return fused(names, fusion=fusion(), **{"unimodal": heads, **options})


def made_for(model, name):
    """The balancer, given what its constructor asks for by name."""
    kind, fusion = BALANCERS[name], model.fusion
    given = {
        "model": model, "fusion": fusion, "layer": getattr(fusion, "attention", None), "epochs": EPOCHS,
        "teachers": teachers(model.names, next(model.parameters()).dtype),
    }  # fmt: skip
    taken = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in given.items() if key in taken}, **SMALL.get(name, {}))


def attached(name, names=("audio", "image"), **options):
    """A model, and the balancing around it."""
    model = plain(name, names, **options)
    return model, eq.BalancerList(model, [made_for(model, name)])


def sgd(model, balancing):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    balancing.attach_optimizer(optimizer)
    return optimizer


class Loss(nn.Module):
    """A module that returns the loss, as Lightning's training step does: what data-parallel training is wrapped around,
    so that parameters that take no part in the loss are found."""

    def __init__(self, model, balancing):
        super().__init__()
        self.model, self.balancing = model, balancing

    def forward(self, inputs):
        return self.balancing.loss(self.model(inputs), inputs["target"])


def step(loss, balancing, optimizer, *batches):
    """One optimizer step over several batches, of which each weighs by its samples, for every turn."""
    total = sum(len(inputs["target"]) for inputs in batches)
    for _ in range(balancing.steps_per_batch):
        optimizer.zero_grad()
        for inputs in batches:
            found = loss(inputs)
            assert bool(found.isfinite()), "a loss that is NaN or infinite"
            (found * len(inputs["target"]) / total).backward()
        balancing.before_step()
        optimizer.step()


def epoch(model, balancing, optimizer, batches, val, *, loss=None):
    """What the balancers say of an epoch; a list among the batches is accumulated into one step."""
    loss = loss or Loss(model, balancing)
    steps = [inputs if isinstance(inputs, list) else [inputs] for inputs in batches]
    model.train()
    for parts in steps:
        step(loss, balancing, optimizer, *parts)
    if balancing.reviews:
        balancing.review([inputs for parts in steps for inputs in parts], val)
    return balancing.end_epoch()


def train(model, balancing, optimizer, epochs, *, task="classification", first=0, **options):
    """Several epochs of small batches, which depend on the number of the epoch alone."""
    logs = []
    for number in range(first, first + epochs):
        batches = [batch_for(task, model.names, seed=10 * number + place, **options) for place in range(STEPS)]
        val = [batch_for(task, model.names, seed=500, **options)]
        logs.append(epoch(model, balancing, optimizer, batches, val))
    return logs


def answers(model, task="classification", **options):
    """Logits in evaluation."""
    with torch.no_grad():
        return model.eval()(batch_for(task, model.names, seed=77, **options)).logits


def finite(model, logs):
    """Whether everything that an epoch left behind is a finite number."""
    values = [value for log in logs for value in log.values()]
    return all(isinstance(value, float) and math.isfinite(value) for value in values) and all(
        bool(p.isfinite().all()) and (p.grad is None or bool(p.grad.isfinite().all())) for p in model.parameters()
    )
