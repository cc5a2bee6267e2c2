"""Small models with any fusion, and single optimizer steps, for the tests of methods that change gradients."""

import torch
from torch import nn

import equipoise as eq
from helpers.fusion import DIM, FEATURES, OUTPUTS


def attention_model(names=("audio", "image"), *, fusion=None, seed=0, dtype=torch.float64, outputs=OUTPUTS, **options):
    """Returns a model with linear encoders; by default with joint attention and heads that train the encoders."""
    torch.manual_seed(seed)
    encoders = {name: nn.Linear(FEATURES[name], DIM) for name in names}
    fusion = fusion or eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, cls_std=1.0)
    return eq.FusionModel(encoders, fusion, outputs, **{"unimodal": "train", **options}).to(dtype)


def step(model, balancing, *batches):
    """Computes the gradients of one step over several batches, weighted by their samples, without
    ``optimizer.step``.
    """
    model.train().zero_grad()
    total = sum(len(inputs["target"]) for inputs in batches)
    for inputs in batches:
        (balancing.loss(model(inputs), inputs["target"]) * len(inputs["target"]) / total).backward()
    balancing.before_step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True)


def flatten(tensor):
    return tensor.detach().reshape(-1).tolist()
