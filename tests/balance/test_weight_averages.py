"""Copies and averages of a model's weights apply the rotation that their buffer holds."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import equipoise as eq
from equipoise.balance.rollingq.effective_rotation import EffectiveRotation, cached_or_raw
from equipoise.errors import ConfigError
from equipoise.geometry import nearest_rotation
from helpers.fusion import DIM, batch, joint_model, run_forward
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
ROTATION = "fusion.attention.core.rolling.rotation"


def build(seed=0, *, query_rows="all", **options):
    model = joint_model(seed=seed, **options)
    return model, eq.balance.RollingQ(
        model.fusion.attention, beta=0.0, max_rotations=None, rho=5.0, query_rows=query_rows
    )


def build_rotated(seed=0, epochs=1, **options):
    model, rolling = build(seed, **options)
    for epoch in range(epochs):
        run_forward(model, [batch(seed=epoch, dtype=model.head.weight.dtype)])
        assert rolling.end_epoch()["rotated"] == 1.0
    return model.eval()


def eval_logits(model):
    with torch.no_grad():
        return model.eval()(batch(seed=9, dtype=torch.float64)).logits


def load_model(state):
    """A new model with the given state dict."""
    model, _ = build(seed=5)
    model.load_state_dict(state)
    return model


def expected_logits(model):
    """Logits computed without RollingQ, from weights into which the rotation of the buffer's SVD is multiplied."""
    u, _, vt = torch.linalg.svd(model.state_dict()[ROTATION])
    plain = joint_model(seed=5)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "rolling" not in name})
    with torch.no_grad():
        block = torch.block_diag(*(u @ vt))
        plain.fusion.attention.query.weight.copy_(block.T @ model.fusion.attention.query.weight)
        plain.fusion.attention.query.bias.copy_(model.fusion.attention.query.bias @ block)
    return eval_logits(plain)


def copy_values(target, source):
    for old, new in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        old.copy_(new)


def copy_data(target, source):
    ours, theirs = (itertools.chain(result.parameters(), result.buffers()) for result in (target, source))
    for old, new in zip(ours, theirs, strict=True):
        old.data.copy_(new.data)


def lerp_values(target, source):
    for old, new in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        old.copy_(old * 0.0 + new)


def load(target, source, **options):
    target.load_state_dict(source.state_dict(), **options)


def load_assigned(target, source):
    load(target, source, assign=True)


def load_loosely(target, source):
    load(target, source, strict=False)


def swap(target, source):
    """As Lightning swaps an average with the current weights for validation."""
    copy_data(target, copy.deepcopy(source))


COPIES = [copy_values, copy_data, lerp_values, load, load_assigned, load_loosely, swap]


@pytest.mark.parametrize("write", COPIES)
@pytest.mark.parametrize("warm", [True, False])
def test_copied_weights_apply_the_rotation(write, warm):
    source, (target, _) = build_rotated(), build(seed=3)
    if warm:
        eval_logits(target)
    with torch.no_grad():
        write(target, source)
    assert torch.equal(eval_logits(target), eval_logits(source))
    merged = eq.merge_rotations(copy.deepcopy(target))
    torch.testing.assert_close(eval_logits(merged), eval_logits(source), **EXACT)
    torch.testing.assert_close(eval_logits(target), expected_logits(source), **EXACT)
    # And back: a copy of weights without a rotation has none.
    plain, _ = build(seed=4)
    with torch.no_grad():
        write(target, plain)
    assert torch.equal(eval_logits(target), eval_logits(plain))


def test_merging_right_after_a_copy_keeps_the_rotation():
    source, (target, _) = build_rotated(), build(seed=3)
    with torch.no_grad():
        copy_values(target, source)
    torch.testing.assert_close(eval_logits(eq.merge_rotations(target)), eval_logits(source), **EXACT)


def test_state_dict_of_other_layers_keeps_the_rotation():
    model = build_rotated()
    before = model.state_dict()[ROTATION].clone()
    encoders = {name: value for name, value in model.state_dict().items() if name.startswith("encoders.")}
    model.load_state_dict(encoders, strict=False)
    assert torch.equal(model.state_dict()[ROTATION], before)
    model.load_state_dict(joint_model(seed=2).state_dict(), strict=False)
    assert torch.equal(model.state_dict()[ROTATION], torch.eye(DIM // 2, dtype=torch.float64).repeat(2, 1, 1))


def test_functional_call_uses_the_given_buffers():
    source, (target, _) = build_rotated(), build(seed=3)
    target.eval()
    before = eval_logits(target)
    state = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    with torch.no_grad():
        given = functional_call(target, state, (batch(seed=9),)).logits
        alone = functional_call(target, {ROTATION: source.state_dict()[ROTATION]}, (batch(seed=9),)).logits
    assert torch.equal(given, eval_logits(source))
    assert not torch.equal(alone, before)
    assert torch.equal(eval_logits(target), before)


def test_vmapped_ensembles():
    models = [build_rotated(), build_rotated(seed=3), build(seed=4)[0].eval()]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    inputs = batch(seed=9)

    def call(parameters, buffers):
        return functional_call(base, (parameters, buffers), (inputs,)).logits

    with torch.no_grad():
        together = vmap(call)(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([eval_logits(result) for result in models]), **EXACT)


@pytest.mark.parametrize("options", [
    {"multi_avg_fn": get_ema_multi_avg_fn(0.7)}, {"avg_fn": get_ema_avg_fn(0.7)}, {},
])  # fmt: skip
@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model_predicts_with_its_state_dict(options, use_buffers):
    model, rolling = build()
    average = AveragedModel(model, use_buffers=use_buffers, **options)
    average.update_parameters(model)
    for epoch in range(3):
        run_forward(model, [batch(seed=epoch)])
        rolling.end_epoch()
        with torch.no_grad():
            model.fusion.attention.query.weight.mul_(1.1)
        average.update_parameters(model)
        average.update_parameters(model)
        module = average.module
        stored = module.state_dict()[ROTATION]
        orthogonal = torch.dist(stored.mT @ stored, torch.eye(DIM // 2, dtype=torch.float64)) < 1e-9
        assert bool(orthogonal) == (not use_buffers)
        assert torch.equal(eval_logits(load_model(module.state_dict())), eval_logits(module))
        torch.testing.assert_close(eval_logits(module), expected_logits(module), **EXACT)
        torch.testing.assert_close(eval_logits(eq.merge_rotations(copy.deepcopy(module))), eval_logits(module), **EXACT)
        model.train()


def test_copied_and_pickled_averages_apply_the_rotation():
    average = AveragedModel(build_rotated(), avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    for epochs in (1, 2):
        average.update_parameters(build_rotated(epochs=epochs))
    for again in (copy.deepcopy(average.module), pickle.loads(pickle.dumps(average.module))):
        assert torch.equal(eval_logits(again), eval_logits(average.module))


def test_average_continues_from_its_applied_rotation():
    average = AveragedModel(build_rotated(), avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    for epochs in (1, 2):
        average.update_parameters(build_rotated(epochs=epochs))
    rolling = average.module.fusion.attention.core.rolling
    run_forward(average.module, [batch(seed=7)])
    assert rolling.end_epoch()["rotated"] == 1.0
    identity = torch.eye(DIM // 2, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(rolling.rotation @ rolling.rotation.mT, identity, **EXACT)


def test_averaged_counter_does_not_allow_extra_rotations():
    model, rolling = build()
    rolling.max_rotations = 1
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    average.update_parameters(model)
    run_forward(model, [batch()])
    assert rolling.end_epoch()["rotations"] == 1.0
    average.update_parameters(model)
    other = average.module.fusion.attention.core.rolling
    assert int(other.rotations) == 0
    run_forward(average.module, [batch(seed=3)])
    log = other.end_epoch()
    assert (log["rotated"], log["rotations"]) == (0.0, 1.0)


@pytest.mark.parametrize("corner", [
    torch.zeros(2, 2), torch.diag(torch.tensor([1.0, -1.0])), torch.full((2, 2), torch.nan),
])  # fmt: skip
def test_average_without_rotation_raises(corner):
    model, rolling = build()
    with torch.no_grad():
        # Zeros: the average of the identity and a half turn.
        rolling.rotation[0, :2, :2] = corner
    message = r"RollingQ: expected a rotation, or an average of rotations .* load the rotation of one model"
    for use in (lambda: eval_logits(model), lambda: eq.merge_rotations(model), lambda: load_model(model.state_dict())):
        with pytest.raises(ConfigError, match=message):
            use()


def test_layer_without_rotation_is_bitwise_unchanged():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        plain, (result, _) = joint_model(dtype=dtype), build(dtype=dtype)
        outputs = [each.train()(batch(dtype=dtype)).logits for each in (plain, result)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.float().square().sum().backward()
        for one, other in zip(plain.parameters(), result.parameters(), strict=True):
            assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


def test_projection_is_cached_until_values_change():
    buffer = torch.linalg.qr(torch.randn(2, 4, 4))[0] * 0.9
    buffer[torch.linalg.det(buffer) < 0, 0] *= -1
    effective = EffectiveRotation()
    first = effective.offset(buffer)
    assert effective.offset(buffer.clone()) is first
    buffer.data[0] = torch.eye(4)
    assert torch.equal(effective.offset(buffer)[0], torch.zeros(4, 4))


def test_copied_rotation_is_applied_without_device_sync():
    first, second = build_rotated().state_dict()[ROTATION], build_rotated(seed=3).state_dict()[ROTATION]
    offset = EffectiveRotation().offset(first)
    identity = torch.eye(DIM // 2, dtype=torch.float64)
    assert torch.equal(cached_or_raw(first.clone(), first, offset), offset)
    assert torch.equal(cached_or_raw(second, first, offset), second - identity)


@pytest.mark.parametrize("angle", [0.3, 1.5, 3.0])
@pytest.mark.parametrize("weight", [0.001, 0.3, 0.5])
def test_nearest_rotation_in_a_plane(angle, weight):
    def plane(turn):
        turn = torch.tensor(turn, dtype=torch.float64)
        return torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()]).reshape(2, 2)

    average = torch.lerp(plane(0.2), plane(0.2 + angle), weight)
    direction = torch.atan2(average[0, 1], average[0, 0])
    torch.testing.assert_close(nearest_rotation(average), plane(float(direction)), **EXACT)


def test_nearest_rotation_of_a_rotation_is_itself():
    for dtype in (torch.float32, torch.float64):
        rotation = torch.linalg.qr(torch.randn(3, 64, 64, dtype=torch.float64))[0]
        rotation = rotation.to(dtype)
        rotation[torch.linalg.det(rotation) < 0, 0] *= -1
        assert torch.equal(nearest_rotation(rotation), rotation)
    assert nearest_rotation(torch.eye(3).bfloat16()).dtype == torch.float32
    assert nearest_rotation(torch.diag(torch.tensor([1.0, -1.0]))).isnan().all()


@pytest.mark.parametrize("write", [copy_values, copy_data])
def test_copied_weights_use_the_depth_of_their_buffer(write):
    def staged(seed):
        model = joint_model(depth=2, seed=seed)
        return model, eq.balance.ProgressiveRollingQ(model.fusion, epochs=2, beta=0.0, query_rows="first")

    (source, balancer), (target, _) = staged(0), staged(3)
    run_forward(source, [batch()])
    balancer.end_epoch()
    with torch.no_grad():
        write(target, source)
    assert torch.equal(eval_logits(target), eval_logits(source))
    assert [layer.readout for layer in target.fusion.layers] == [False, True]


def test_average_of_depths_uses_the_later_depth():
    model = joint_model(depth=2)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    model.fusion.use_depth(1)
    average.update_parameters(model)
    model.fusion.use_depth(2)
    for _ in range(3):
        average.update_parameters(model)
    assert torch.equal(eval_logits(average.module), eval_logits(model))


@pytest.mark.parametrize("depth", [1, 2])
def test_rotation_without_matching_layer_raises(depth):
    state, plain = build_rotated(depth=depth).state_dict(), joint_model(seed=3, depth=depth)
    message = r"load_state_dict: expected a model with a RollingQ, got none to load 'fusion\..*rolling\.rotation'"
    with pytest.raises(RuntimeError, match=message):
        plain.load_state_dict(state, strict=False)
    detached, rolling = build(depth=depth)
    rolling.detach()
    with pytest.raises(RuntimeError, match=message):
        detached.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=message):
        plain.load_state_dict(state)
    # The identity changes nothing, so it may be left out.
    model, _ = build(depth=depth)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(eval_logits(plain), eval_logits(model))
