"""Evaluation for a while, and no trace of it."""

import pytest
import torch
from torch import nn

from equipoise.nn.eval_mode import eval_mode_no_grad


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_rng_are_restored(fails):
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(5).eval()))
    before, state = [part.training for part in model.modules()], torch.get_rng_state()
    running = model[1][1].running_mean.clone()
    weight = model[0].weight.clone()
    try:
        with eval_mode_no_grad(model):
            assert not any(part.training for part in model.modules())
            torch.rand(7)
            assert not model(torch.ones(2, 3)).requires_grad
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [part.training for part in model.modules()] == before == [True, True, True, True, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.equal(model[1][1].running_mean, running)
    assert torch.equal(model[0].weight, weight)
