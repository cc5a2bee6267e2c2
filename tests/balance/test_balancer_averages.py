"""Every balancer with an average of the weights beside it: training is not disturbed, and the average is a model."""

import copy
import functools

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from helpers.balancer_cases import BALANCERS, all_finite, build_with_balancer, eval_logits, sgd, train

AVERAGES = {
    "mean of weights and buffers": lambda model: AveragedModel(model, use_buffers=True),
    "mean of weights": AveragedModel,
    "exponential": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=True),
}


class StateDictAverage:
    """An exponential moving average of everything in the state dict, as timm's ModelEma has it."""

    def __init__(self, model):
        self.module = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update_parameters(self, model):
        for old, new in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            old.copy_(0.5 * old + 0.5 * new)


AVERAGES["state dict"] = StateDictAverage


@functools.cache
def trained_alone(name):
    """Returns the logs of two epochs without an average, and the model after them."""
    model, balancing = build_with_balancer(name)
    optimizer = sgd(model, balancing)
    return [train(model, balancing, optimizer, 1, first=number) for number in range(2)], model


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("name", BALANCERS)
def test_weight_average_does_not_change_training(name, kind):
    logs, alone = trained_alone(name)
    model, balancing = build_with_balancer(name)
    average, optimizer = AVERAGES[kind](model), sgd(model, balancing)
    for number, [log] in enumerate(logs):
        [other] = train(model, balancing, optimizer, 1, first=number)
        assert other == pytest.approx(log, rel=0, abs=0, nan_ok=True)
        average.update_parameters(model)
        eval_logits(average.module)
    average.update_parameters(model)
    for one, other in zip(alone.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    fresh, _ = build_with_balancer(name, seed=9)
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(eval_logits(fresh), eval_logits(average.module))


class ModelAndBalancers(torch.nn.Module):
    """A model with its balancers as submodules, as a LightningModule has them."""

    def __init__(self, model, balancing):
        super().__init__()
        self.model, self.balancers = model, torch.nn.ModuleList(balancing.balancers)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("name", BALANCERS)
def test_average_that_includes_the_balancers(name, use_buffers):
    model, balancing = build_with_balancer(name)
    optimizer, both = sgd(model, balancing), ModelAndBalancers(model, balancing)
    average = AveragedModel(both, use_buffers=use_buffers)
    for number in range(2):
        average.update_parameters(both)
        train(model, balancing, optimizer, 1, first=number)
    average.update_parameters(both)
    both.load_state_dict(average.module.state_dict())
    assert all_finite(model, train(model, balancing, optimizer, 1))
