"""Saving and loading rotations: state dicts, files, copies, dtypes, and resuming within an epoch."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import equipoise as eq
from helpers.fusion import DIM, batch, joint_model, run_forward
from helpers.tolerance import TOL


def build_balancer(model, **options):
    return eq.balance.RollingQ(model.fusion.attention, **{"beta": 0.0, "max_rotations": None, **options})


def build_rotated(dtype=torch.float64, **options):
    model = joint_model(dtype=dtype)
    rolling = build_balancer(model, **options)
    run_forward(model, [batch(dtype=dtype)])
    assert rolling.end_epoch()["rotated"] == 1.0
    return model, rolling


def identity_rotation():
    return torch.eye(DIM // 2, dtype=torch.float64).repeat(2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", ["per_head", "joint"])
def test_safetensors_round_trip_is_exact(tmp_path, dtype, heads):
    model, rolling = build_rotated(dtype, heads=heads)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    fresh = joint_model(dtype=dtype, seed=9)
    other = build_balancer(fresh, heads=heads)
    fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    inputs = batch(seed=5, dtype=dtype)
    assert torch.equal(fresh.eval()(inputs).logits, model.eval()(inputs).logits)
    for name in ("rotation", "rotations", "epochs", "last_epoch", "air"):
        assert torch.equal(getattr(other, name), getattr(rolling, name))


def test_rotation_loads_with_weights_only():
    model, _ = build_rotated()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = joint_model(seed=9)
    build_balancer(fresh)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.eval()(batch()).logits, model.eval()(batch()).logits)


def test_checkpoint_without_rotation_loads_identity():
    old = joint_model(seed=9)
    model, rolling = build_rotated()
    run_forward(model, [batch()])
    model.load_state_dict(old.state_dict())
    assert torch.equal(rolling.rotation, identity_rotation())
    assert (int(rolling.rotations), int(rolling.epochs), int(rolling.last_epoch)) == (0, 0, 0)
    assert rolling.air.isnan().all()
    assert torch.equal(model.eval()(batch()).logits, old.eval()(batch()).logits)
    assert rolling.end_epoch()["rotated"] == 0.0


def test_rotated_checkpoint_in_plain_model_raises():
    model, _ = build_rotated()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attention\.core\.rolling\.rotation"):
        joint_model().load_state_dict(model.state_dict())


def test_checkpoint_with_other_head_count_raises():
    model, _ = build_rotated()
    fresh = joint_model()
    build_balancer(fresh, heads="joint")
    with pytest.raises(RuntimeError, match=r"size mismatch for fusion\.attention\.core\.rolling\.rotation"):
        fresh.load_state_dict(model.state_dict())


@pytest.mark.parametrize("tail", [3, None])
def test_resume_within_an_epoch_matches_uninterrupted_run(tmp_path, tail):
    batches = [batch(seed=seed, size=size) for seed, size in enumerate((5, 2, 3, 7, 4))]
    full, first, second = joint_model(), joint_model(), joint_model(seed=9)
    rolling, _, resumed = (build_balancer(result, tail=tail) for result in (full, first, second))
    run_forward(full, batches)
    run_forward(first, batches[:2])
    save_file(first.state_dict(), tmp_path / "middle.safetensors")
    second.load_state_dict(load_file(tmp_path / "middle.safetensors"))
    run_forward(second, batches[2:])
    assert resumed.end_epoch() == rolling.end_epoch()
    assert torch.equal(resumed.rotation, rolling.rotation)


def test_resume_between_epochs_keeps_the_schedule():
    options = {"max_rotations": 2, "min_epochs_between": 2}
    straight, stopped = joint_model(), joint_model()
    one, other = build_balancer(straight, **options), build_balancer(stopped, **options)
    for epoch in range(5):
        run_forward(straight, [batch(seed=epoch)])
        run_forward(stopped, [batch(seed=epoch)])
        assert one.end_epoch() == other.end_epoch()
        state, stopped = stopped.state_dict(), joint_model(seed=9)
        other = build_balancer(stopped, **options)
        stopped.load_state_dict(state)
    assert torch.equal(one.rotation, other.rotation)
    assert int(other.rotations) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_rotation_precision(dtype):
    model, rolling = build_rotated(torch.float32)
    before, exact = rolling.rotation.clone(), model.eval()(batch(dtype=torch.float32)).logits
    assert model.to(dtype).fusion.attention.query.weight.dtype == dtype
    assert rolling.rotation.dtype == torch.float32
    assert torch.equal(rolling.rotation, before)
    assert (rolling.rotations.dtype, rolling.air.dtype) == (torch.int64, torch.float32)
    logits = model(batch(dtype=dtype)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact.detach(), **TOL[torch.bfloat16])
    model.float()
    assert torch.equal(rolling.rotation, before)


def test_rotation_follows_model_to_float64():
    model, rolling = build_rotated(torch.float32)
    before = rolling.rotation.clone()
    model.double()
    assert rolling.rotation.dtype == torch.float64
    assert torch.equal(rolling.rotation, before.double())
    run_forward(model, [batch(seed=1)])
    rolling.end_epoch()
    product = rolling.rotation @ rolling.rotation.mT
    torch.testing.assert_close(product, identity_rotation(), **TOL[torch.float64])


def test_copy_is_independent():
    model, rolling = build_rotated()
    twin = copy.deepcopy(model)
    other = twin.fusion.attention.core.rolling
    assert other is not rolling
    assert torch.equal(twin.eval()(batch()).logits, model.eval()(batch()).logits)
    kept = rolling.rotation.clone()
    run_forward(twin, [batch(seed=7)])
    assert rolling.end_epoch()["rotated"] == 0.0
    assert other.end_epoch()["rotated"] == 1.0
    assert torch.equal(rolling.rotation, kept)
    assert not torch.equal(other.rotation, kept)
    eq.merge_rotations(twin)
    assert "rolling" not in dict(twin.fusion.attention.core.named_children())
    assert torch.equal(rolling.rotation, kept)
    assert model.fusion.attention.core._forward_pre_hooks
    assert not twin.fusion.attention.core._forward_pre_hooks


def test_layer_class_is_unchanged_and_balancers_pickle():
    before = dict(vars(eq.balance.RollingQ))
    _, rolling = build_rotated()
    assert dict(vars(eq.balance.RollingQ)) == before
    again = pickle.loads(pickle.dumps(rolling))
    assert torch.equal(again.rotation, rolling.rotation)


def test_pickled_model_keeps_its_rotation():
    model, _ = build_rotated()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.eval()(batch()).logits, model.eval()(batch()).logits)
    run_forward(again, [batch(seed=3)])
    assert again.fusion.attention.core.rolling.end_epoch()["rotated"] == 1.0


def test_many_products_stay_orthogonal():
    model, rolling = build_rotated(torch.float32)
    for epoch in range(100):
        run_forward(model, [batch(size=2, seed=epoch, dtype=torch.float32)])
        rolling.end_epoch()
    assert int(rolling.rotations) == 101
    product = rolling.rotation @ rolling.rotation.mT
    torch.testing.assert_close(product, identity_rotation().float(), **TOL[torch.float32])


def test_rotation_is_a_buffer_without_gradient():
    model, rolling = build_rotated()
    assert "fusion.attention.core.rolling.rotation" in dict(model.named_buffers())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in joint_model().parameters())
    assert not rolling.rotation.requires_grad
