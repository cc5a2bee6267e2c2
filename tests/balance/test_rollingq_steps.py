"""RollingQ counts each batch of a step once, and only those on which the optimizer stepped."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import equipoise as eq
from equipoise.nn.attention import Attended
from helpers.fusion import batch, joint_model
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]


class Staged:
    """RollingQ in the first stage of a stack."""

    depth = 2

    @staticmethod
    def attach(model, **options):
        balancer = eq.balance.ProgressiveRollingQ(model.fusion, epochs=2, **options)
        return balancer, balancer.stages[0]


class Single:
    depth = 1

    @staticmethod
    def attach(model, **options):
        balancer = eq.balance.RollingQ(model.fusion.attention, **options)
        return balancer, balancer


def run_epoch(kind, *, alone=False, steps=4, call=None, bad=(), validate=False, accumulate=1, **options):
    """State and log after an epoch of training steps; every step has a batch of its own."""
    model = joint_model(depth=kind.depth)
    balancer, rolling = kind.attach(model, beta=0.0, **{"tail": 3, **options})
    balancing = None if alone else eq.BalancerList(model, [balancer])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call = call or (lambda model, inputs: model(inputs))
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        for part in range(accumulate):
            inputs = batch(seed=10 * step + part, size=3 + part)
            if step in bad:
                inputs["audio"][0] = float("nan")
            output = call(model, inputs)
            loss = (
                balancing.loss(output, inputs["target"]) if balancing else model.loss(output.logits, inputs["target"])
            )
            (loss / accumulate).backward()
        if balancing:
            balancing.before_step()
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()):
            optimizer.step()
        if validate:
            with torch.no_grad():
                model.loss(model(batch(seed=99)).logits, batch(seed=99)["target"])
                if balancing:
                    balancing.loss(model(batch(seed=99)), batch(seed=99)["target"])
            model.eval()(batch(seed=98))
    if options.get("statistics") == "full_pass":
        rolling.measure(model, [batch(seed=7), batch(seed=8)])
    sums = rolling.get_extra_state()
    log = balancer.end_epoch()
    assert log["rotated"] == 1.0
    return sums, log, rolling.rotation


def assert_same_state(one, other):
    torch.testing.assert_close(one[0], other[0], **EXACT)
    assert one[1] == pytest.approx(other[1], abs=1e-12)
    torch.testing.assert_close(one[2], other[2], **EXACT)


@pytest.mark.parametrize("kind", [Single, Staged])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("options", [{}, {"tail": None}, {"statistics": "full_pass"}])
def test_activation_checkpointing_counts_a_batch_once(kind, alone, options):
    def checkpointed(model, inputs):
        return checkpoint(model, inputs, use_reentrant=False)

    assert_same_state(
        run_epoch(kind, alone=alone, **options), run_epoch(kind, alone=alone, call=checkpointed, **options)
    )


@pytest.mark.parametrize("kind", [Single, Staged])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layer_is_counted_once(kind, alone, reentrant):
    def partly(model, inputs):
        layer = model.fusion.layers[0]
        inner = layer.forward

        def attend(tokens, source, **options):
            attended = checkpoint(lambda *given: inner(*given, **options), tokens, source, use_reentrant=reentrant)
            return Attended(*attended)

        layer.forward = lambda tokens, source=None, **options: attend(tokens, source, **options)
        try:
            return model(inputs)
        finally:
            layer.forward = inner

    assert_same_state(run_epoch(kind, alone=alone), run_epoch(kind, alone=alone, call=partly))


@pytest.mark.parametrize("kind", [Single, Staged])
def test_skipped_steps_are_not_recorded(kind):
    assert_same_state(run_epoch(kind, steps=4, bad=(3,), tail=2), run_epoch(kind, steps=3, tail=2))


@pytest.mark.parametrize("kind", [Single, Staged])
def test_validation_and_no_grad_passes_are_not_recorded(kind):
    assert_same_state(run_epoch(kind), run_epoch(kind, validate=True))


@pytest.mark.parametrize("kind", [Single, Staged])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_statistics_are_equal_with_and_without_balancer_list(kind, accumulate):
    assert_same_state(run_epoch(kind, accumulate=accumulate), run_epoch(kind, accumulate=accumulate, alone=True))


def test_batch_with_unused_loss_is_not_recorded():
    def looks_twice(model, inputs):
        model(batch(seed=55))
        return model(inputs)

    assert_same_state(run_epoch(Single), run_epoch(Single, call=looks_twice))
