"""Batches of every task for the tests of the balancers."""

import torch

import equipoise as eq
from helpers.fusion import DIM, OUTPUTS, batch
from helpers.steps import fused
from helpers.tolerance import TOL

TASKS = ("classification", "multilabel", "regression")


def batch_for(task, *args, **options):
    """As ``small_fusion.batch``, with a target of the task."""
    made = batch(*args, **options)
    random = torch.Generator().manual_seed(options.get("seed", 0) + 1000)
    scores = torch.randn(len(made["target"]), OUTPUTS, generator=random, dtype=torch.float64)
    if task != "classification":
        made["target"] = (scores > 0).double() if task == "multilabel" else scores
    return made


def static(names=("audio", "image"), **options):
    """A model whose logits are a sum over modalities."""
    return fused(names, fusion=options.pop("fusion", None) or eq.fusion.Concat(DIM), **options)


def rows(tensor):
    """Nested lists of numbers, as the oracles read them."""
    return tensor.detach().tolist()


def loss_of(balancing, made, inputs):
    """The loss of one batch in training mode, as a number."""
    return float(balancing.loss(made.train()(inputs), inputs["target"]).detach())


def penalty_of(balancer, made, inputs):
    """A balancer's own term for one batch in training mode, and a step; a tensor without gradient, or None."""
    output = made.train()(inputs)
    balancer.observe(output, inputs["target"])
    penalty = balancer.penalty(output, inputs["target"])
    balancer.before_step()
    return None if penalty is None else penalty.detach()


def assert_like_single_precision(balancer, made, inputs):
    """Under autocast a balancer's own term is computed in single precision, and is that of single precision."""
    exact = penalty_of(balancer, made, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = penalty_of(balancer, made, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, **TOL[torch.bfloat16])
