"""Diagnostics restore the state of the model, also after errors of the user or of the model."""

import copy

import pytest
import torch

from equipoise.diagnostics import corruption_curve, gradient_norms, mask_modality, modality_shapley, ood
from equipoise.errors import EquipoiseError
from helpers.fusion import batch, joint_model
from helpers.model_state import FailingModel, model_state

RUNS = {
    "ood": lambda made, loader: ood(made, loader, loader),
    "corruption_curve": lambda made, loader: corruption_curve(made, loader, modality="audio"),
    "mask_modality": lambda made, loader: mask_modality(made, loader),
    "gradient_norms": lambda made, loader: gradient_norms(made, loader),
    "modality_shapley": lambda made, loader: modality_shapley(made, loader),
}
WRONG = {
    "ood": lambda made, loader: ood(made, loader, loader, score="none such"),
    "corruption_curve": lambda made, loader: corruption_curve(made, [*loader, {}], modality="audio"),
    "mask_modality": lambda made, loader: mask_modality(made, [*loader, {}]),
    "gradient_norms": lambda made, loader: gradient_norms(made, [*loader, {}]),
    "modality_shapley": lambda made, loader: modality_shapley(made, [*loader, {}]),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("ends", ["well", "with a user's error", "with the model's error"])
def test_model_state_is_restored(name, ends):
    model = joint_model(dropout=0.5).train()
    model.fusion.eval()
    model.head.weight.requires_grad_(False)
    batches = [batch(seed=seed) for seed in range(2)]
    # Some gradients are there already, as in the middle of an accumulation.
    model.loss(model(batches[0]).logits, batches[0]["target"]).backward()
    model.head.bias.grad = None
    if ends == "with the model's error":
        model.encoders["audio"] = FailingModel()
    before, given = model_state(model, batches), copy.deepcopy(batches)
    if ends == "well":
        RUNS[name](model, batches)
    elif ends == "with a user's error":
        with pytest.raises(EquipoiseError):
            WRONG[name](model, batches)
    else:
        with pytest.raises(RuntimeError, match="broken"):
            RUNS[name](model, batches)
    assert model_state(model, batches) == before
    assert all(torch.equal(a[key], b[key]) for a, b in zip(batches, given, strict=True) for key in a)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_figures_again(name):
    model, batches = joint_model(dropout=0.5).train(), [batch(seed=seed) for seed in range(2)]
    first, second = (RUNS[name](model, batches) for _ in range(2))
    assert str(first) == str(second)
