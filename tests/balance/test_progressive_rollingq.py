"""RollingQ in a stack, one layer after the other: the schedule, its budget, and what a checkpoint must hold."""

import io

import pytest
import torch

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.fusion import DIM, batch, forward, model
from helpers.tolerance import TOL

DEPTH, HEADS = 3, 2


def staged(epochs=7, *, seed=0, **options):
    made = model(heads=HEADS, depth=DEPTH, seed=seed)
    options = {"beta": 0.0, "max_rotations": 1, "query_rows": "all", **options}
    return made, eq.balance.ProgressiveRollingQ(made.fusion, epochs=epochs, **options)


def epoch(made, balancer, seed):
    forward(made, [batch(seed=seed)])
    return balancer.end_epoch()


def turned(balancer):
    eye = torch.eye(DIM // HEADS, dtype=torch.float64)
    return [bool((stage.rotation - eye).abs().max() > 1e-6) for stage in balancer.stages]


def test_stages_share_the_epochs_and_the_last_takes_the_rest():
    made, balancer = staged(epochs=8)
    depths, stages, rotations = [], [], []
    for number in range(8):
        depths.append(int(made.fusion.active))
        log = epoch(made, balancer, number)
        stages.append(log["stage"])
        rotations.append(log["rotations"])
    assert depths == stages == [1, 1, 2, 2, 3, 3, 3, 3]
    assert rotations == [1, 1, 2, 2, 3, 3, 3, 3]
    assert balancer.stage() == DEPTH


def test_each_stage_has_its_own_budget():
    made, balancer = staged(epochs=9, max_rotations=2)
    counts = []
    for number in range(9):
        epoch(made, balancer, number)
        counts.append([int(stage.rotations) for stage in balancer.stages])
    assert counts[2::3] == [[2, 0, 0], [2, 2, 0], [2, 2, 2]]


def test_rotation_of_a_finished_stage_is_frozen():
    made, balancer = staged(epochs=6)
    seen = []
    for number in range(6):
        epoch(made, balancer, number)
        seen.append(([stage.rotation.clone() for stage in balancer.stages], turned(balancer)))
    assert [marks for _, marks in seen[1::2]] == [[True, False, False], [True, True, False], [True, True, True]]
    assert torch.equal(seen[1][0][0], seen[5][0][0])
    assert torch.equal(seen[3][0][1], seen[5][0][1])


def test_only_the_layers_in_use_get_gradients():
    made, balancer = staged(epochs=3)
    for used in (1, 2, 3):
        made.zero_grad(set_to_none=True)
        made.loss(made(batch()).logits, batch()["target"]).backward()
        assert [layer.query.weight.grad is not None for layer in made.fusion.layers] == [n <= used for n in (1, 2, 3)]
        assert [layer.readout for layer in made.fusion.layers] == [n == used for n in (1, 2, 3)]
        epoch(made, balancer, used)


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("middle", [False, True])
def test_a_checkpoint_of_model_and_balancer_restores_everything(stop, middle):
    straight, balancer = staged(max_rotations=2)
    for number in range(stop):
        epoch(straight, balancer, number)
    if middle:
        forward(straight, [batch(seed=50)])
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "balancer": balancer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, other = staged(seed=9, max_rotations=2)
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["balancer"])
    assert torch.equal(resumed.eval()(batch()).logits, straight.eval()(batch()).logits)
    assert other.stage() == balancer.stage()
    for number in range(stop, 7):
        assert epoch(straight, balancer, number) == pytest.approx(epoch(resumed, other, number), abs=0, nan_ok=True)
    assert torch.equal(resumed.eval()(batch()).logits, straight.eval()(batch()).logits)
    for one, two in zip(balancer.stages, other.stages, strict=True):
        assert torch.equal(one.rotation, two.rotation)


def test_the_order_of_loading_does_not_matter():
    straight, balancer = staged()
    for number in range(4):
        epoch(straight, balancer, number)
    resumed, other = staged(seed=9)
    other.load_state_dict(balancer.state_dict())
    resumed.load_state_dict(straight.state_dict())
    assert epoch(straight, balancer, 4) == pytest.approx(epoch(resumed, other, 4), abs=0)
    assert torch.equal(resumed.eval()(batch()).logits, straight.eval()(batch()).logits)


def test_the_rotations_live_in_the_layers_and_the_stage_in_the_balancer():
    made, balancer = staged()
    assert list(balancer.state_dict()) == ["epoch"]
    saved = [name for name in made.state_dict() if name.endswith("rolling.rotation")]
    assert saved == [f"fusion.blocks.{n}.attention.core.rolling.rotation" for n in range(DEPTH)]


def test_folds_when_every_row_was_turned():
    made, balancer = staged(epochs=3)
    for number in range(3):
        epoch(made, balancer, number)
    assert turned(balancer) == [True] * DEPTH
    unfolded = made.eval()(batch()).logits
    eq.merge_rotations(made)
    torch.testing.assert_close(made(batch()).logits, unfolded, **TOL[torch.float64])
    assert not any("rolling" in name for name in made.state_dict())


def test_fewer_epochs_than_stages():
    with pytest.raises(
        ConfigError, match="ProgressiveRollingQ: expected at least one epoch for each of 3 stages, got 2"
    ):
        staged(epochs=2)


def test_depth_one_is_plain_rollingq():
    made, plain = model(), model()
    balancer = eq.balance.ProgressiveRollingQ(made.fusion, epochs=2, beta=0.0)
    rolling = eq.balance.RollingQ(plain.fusion.attention, beta=0.0)
    for number in range(2):
        epoch(made, balancer, number)
        epoch(plain, rolling, number)
    assert torch.equal(balancer.stages[0].rotation, rolling.rotation)
