"""Batches of every task for the tests of the balancers."""

import torch

import equipoise as eq
from helpers.fusion import DIM, OUTPUTS, batch
from helpers.steps import attention_model
from helpers.tolerance import TOL

TASKS = ("classification", "multilabel", "regression")


def batch_for(task, *args, **options):
    """Returns a batch as ``fusion.batch``, with a target of the task."""
    result = batch(*args, **options)
    random = torch.Generator().manual_seed(options.get("seed", 0) + 1000)
    scores = torch.randn(len(result["target"]), OUTPUTS, generator=random, dtype=torch.float64)
    if task != "classification":
        result["target"] = (scores > 0).double() if task == "multilabel" else scores
    return result


def additive_model(names=("audio", "image"), **options):
    """Returns a model whose logits are a sum over modalities."""
    return attention_model(names, fusion=options.pop("fusion", None) or eq.fusion.Concat(DIM), **options)


def to_lists(tensor):
    """Converts to nested lists of numbers for the oracles."""
    return tensor.detach().tolist()


def loss_of(balancing, model, inputs):
    """Returns the loss of one batch in training mode as a float."""
    return float(balancing.loss(model.train()(inputs), inputs["target"]).detach())


def penalty_of(balancer, model, inputs):
    """Returns the penalty of a balancer for one batch in training mode after a step, detached; or None."""
    output = model.train()(inputs)
    balancer.observe(output, inputs["target"])
    penalty = balancer.penalty(output, inputs["target"])
    balancer.before_step()
    return None if penalty is None else penalty.detach()


def assert_like_single_precision(balancer, model, inputs):
    """Asserts that the penalty of a balancer under autocast equals that in float32."""
    exact = penalty_of(balancer, model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result = penalty_of(balancer, model, inputs)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, exact, **TOL[torch.bfloat16])
