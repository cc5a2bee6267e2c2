"""RollingQ in a stack, one layer after the other: the schedule, its budget, and what a checkpoint must hold."""

import io

import pytest
import torch

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.fusion import DIM, batch, joint_model, run_forward
from helpers.tolerance import TOL

DEPTH, HEADS = 3, 2


def build(epochs=7, *, seed=0, **options):
    model = joint_model(heads=HEADS, depth=DEPTH, seed=seed)
    options = {"beta": 0.0, "max_rotations": 1, "query_rows": "all", **options}
    return model, eq.balance.ProgressiveRollingQ(model.fusion, epochs=epochs, **options)


def train_epoch(model, balancer, seed):
    run_forward(model, [batch(seed=seed)])
    return balancer.end_epoch()


def rotated_stages(balancer):
    eye = torch.eye(DIM // HEADS, dtype=torch.float64)
    return [bool((stage.rotation - eye).abs().max() > 1e-6) for stage in balancer.stages]


def test_epochs_are_divided_among_stages():
    model, balancer = build(epochs=8)
    depths, stages, rotations = [], [], []
    for number in range(8):
        depths.append(int(model.fusion.active))
        log = train_epoch(model, balancer, number)
        stages.append(log["stage"])
        rotations.append(log["rotations"])
    assert depths == stages == [1, 1, 2, 2, 3, 3, 3, 3]
    assert rotations == [1, 1, 2, 2, 3, 3, 3, 3]
    assert balancer.stage() == DEPTH


def test_rotation_limit_is_per_stage():
    model, balancer = build(epochs=9, max_rotations=2)
    counts = []
    for number in range(9):
        train_epoch(model, balancer, number)
        counts.append([int(stage.rotations) for stage in balancer.stages])
    assert counts[2::3] == [[2, 0, 0], [2, 2, 0], [2, 2, 2]]


def test_rotation_of_a_finished_stage_is_frozen():
    model, balancer = build(epochs=6)
    seen = []
    for number in range(6):
        train_epoch(model, balancer, number)
        seen.append(([stage.rotation.clone() for stage in balancer.stages], rotated_stages(balancer)))
    assert [marks for _, marks in seen[1::2]] == [[True, False, False], [True, True, False], [True, True, True]]
    assert torch.equal(seen[1][0][0], seen[5][0][0])
    assert torch.equal(seen[3][0][1], seen[5][0][1])


def test_only_active_layers_get_gradients():
    model, balancer = build(epochs=3)
    for used in (1, 2, 3):
        model.zero_grad(set_to_none=True)
        model.loss(model(batch()).logits, batch()["target"]).backward()
        assert [layer.query.weight.grad is not None for layer in model.fusion.layers] == [n <= used for n in (1, 2, 3)]
        assert [layer.readout for layer in model.fusion.layers] == [n == used for n in (1, 2, 3)]
        train_epoch(model, balancer, used)


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("middle", [False, True])
def test_checkpoint_of_model_and_balancer_restores_state(stop, middle):
    straight, balancer = build(max_rotations=2)
    for number in range(stop):
        train_epoch(straight, balancer, number)
    if middle:
        run_forward(straight, [batch(seed=50)])
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "balancer": balancer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, other = build(seed=9, max_rotations=2)
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["balancer"])
    assert torch.equal(resumed.eval()(batch()).logits, straight.eval()(batch()).logits)
    assert other.stage() == balancer.stage()
    for number in range(stop, 7):
        assert train_epoch(straight, balancer, number) == pytest.approx(
            train_epoch(resumed, other, number), abs=0, nan_ok=True
        )
    assert torch.equal(resumed.eval()(batch()).logits, straight.eval()(batch()).logits)
    for one, two in zip(balancer.stages, other.stages, strict=True):
        assert torch.equal(one.rotation, two.rotation)


def test_loading_order_does_not_matter():
    straight, balancer = build()
    for number in range(4):
        train_epoch(straight, balancer, number)
    resumed, other = build(seed=9)
    other.load_state_dict(balancer.state_dict())
    resumed.load_state_dict(straight.state_dict())
    assert train_epoch(straight, balancer, 4) == pytest.approx(train_epoch(resumed, other, 4), abs=0)
    assert torch.equal(resumed.eval()(batch()).logits, straight.eval()(batch()).logits)


def test_layers_store_rotations_and_balancer_stores_stage():
    model, balancer = build()
    assert list(balancer.state_dict()) == ["epoch"]
    saved = [name for name in model.state_dict() if name.endswith("rolling.rotation")]
    assert saved == [f"fusion.blocks.{n}.attention.core.rolling.rotation" for n in range(DEPTH)]


def test_rotations_can_be_merged_if_all_rows_are_rotated():
    model, balancer = build(epochs=3)
    for number in range(3):
        train_epoch(model, balancer, number)
    assert rotated_stages(balancer) == [True] * DEPTH
    unfolded = model.eval()(batch()).logits
    eq.merge_rotations(model)
    torch.testing.assert_close(model(batch()).logits, unfolded, **TOL[torch.float64])
    assert not any("rolling" in name for name in model.state_dict())


def test_fewer_epochs_than_stages():
    with pytest.raises(
        ConfigError, match="ProgressiveRollingQ: expected at least one epoch for each of 3 stages, got 2"
    ):
        build(epochs=2)


def test_depth_one_is_plain_rollingq():
    model, plain = joint_model(), joint_model()
    balancer = eq.balance.ProgressiveRollingQ(model.fusion, epochs=2, beta=0.0)
    rolling = eq.balance.RollingQ(plain.fusion.attention, beta=0.0)
    for number in range(2):
        train_epoch(model, balancer, number)
        train_epoch(plain, rolling, number)
    assert torch.equal(balancer.stages[0].rotation, rolling.rotation)
