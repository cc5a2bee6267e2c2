"""Every balancer with models in other floating point types: a step works, and statistics stay in single precision."""

import pytest
import torch

from helpers.balancer_cases import BALANCERS, build_balancer, build_plain_model, build_with_balancer, epoch, sgd
from helpers.fusion import batch

HALF = (torch.bfloat16, torch.float16)


def train_one_epoch(name, dtype):
    """A model after an epoch of three steps, its balancing, and what was logged."""
    model, balancing = build_with_balancer(name, dtype=dtype)
    batches = [batch(seed=seed, dtype=dtype) for seed in range(3)]
    log = epoch(model, balancing, sgd(model, balancing), batches, [batch(seed=9, dtype=dtype)])
    return model, balancing, log


def assert_dtypes_and_finite(model, balancing, log, dtype):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.dtype == dtype and bool(g.isfinite().all()) for g in gradients)
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in model.parameters())
    assert all(value == value and abs(value) < 1e4 for value in log.values())
    for balancer in balancing.balancers:
        for stage in getattr(balancer, "stages", [balancer]):
            for key, buffer in stage.named_buffers():
                # What DiagnoseRelearn keeps are weights, in their own type.
                if buffer.is_floating_point() and not key.startswith("initial_"):
                    assert buffer.dtype in (torch.float32, torch.float64), key
                    assert key == "air" or bool(buffer.isfinite().all()), key
    logits = model.eval()(batch(seed=4, dtype=dtype)).logits
    assert logits.dtype in (dtype, torch.float32)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("name", BALANCERS)
def test_models_of_other_dtypes(name, dtype):
    model, balancing, log = train_one_epoch(name, dtype)
    assert_dtypes_and_finite(model, balancing, log, dtype)


@pytest.mark.parametrize("name", BALANCERS)
def test_model_cast_after_balancer_was_built(name):
    model = build_plain_model(name, dtype=torch.float32)
    balancer = build_balancer(model, name)
    before = {key: buffer.dtype for key, buffer in balancer.named_buffers()}
    model.bfloat16()
    assert {key: buffer.dtype for key, buffer in balancer.named_buffers()} == before
