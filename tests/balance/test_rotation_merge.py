"""Merging rotations keeps outputs and removes RollingQ; it raises an error if outputs would change."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.foreign import GroupedAttention, labels
from helpers.fusion import DIM, batch, joint_model, run_forward
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
HALF_ULPS = {torch.float64: {"rtol": 0, "atol": 1e-12}, torch.float32: {"rtol": 0, "atol": 1e-6}}


def build_rotated(model, **options):
    rolling = eq.balance.RollingQ(model.fusion.attention, **{"beta": 0.0, **options})
    run_forward(model, [batch(dtype=model.head.weight.dtype)])
    assert rolling.end_epoch()["rotated"] == 1.0
    return rolling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", ["per_head", "joint"])
@pytest.mark.parametrize(("number", "depth"), [(1, 1), (3, 1), (2, 3)])
def test_merged_layer_equals_rotated_layer(dtype, heads, number, depth):
    model = joint_model(heads=number, depth=depth, dtype=dtype)
    plain = model.eval()(batch(dtype=dtype)).logits
    build_rotated(model, heads=heads)
    model.eval()
    unfolded = model(batch(dtype=dtype)).logits
    assert float((unfolded - plain).detach().abs().max()) > 1e-3
    assert eq.merge_rotations(model) is model
    torch.testing.assert_close(model(batch(dtype=dtype)).logits, unfolded, **HALF_ULPS[dtype])


def test_merge_restores_the_original_layer_type():
    model, plain = joint_model(), joint_model()
    nn.init.normal_(model.fusion.attention.query.bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    build_rotated(model)
    eq.merge_rotations(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(batch()).logits, model.eval()(batch()).logits)
    changed = {name for name, value in before.items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {"fusion.attention.query.weight", "fusion.attention.query.bias"}


def test_merge_without_rotation_keeps_weights():
    model, plain = joint_model(), joint_model()
    eq.balance.RollingQ(model.fusion.attention)
    eq.merge_rotations(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_merged_layer_can_be_balanced_again():
    model = joint_model()
    build_rotated(model)
    eq.merge_rotations(model)
    again = build_rotated(model)
    unfolded = model.eval()(batch()).logits
    assert int(again.rotations) == 1
    torch.testing.assert_close(eq.merge_rotations(model)(batch()).logits, unfolded, **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keyheads", [1, 2, 4])
@pytest.mark.parametrize("heads", ["per_head", "joint"])
def test_foreign_modules_with_grouped_keys(bias, keyheads, heads):
    torch.manual_seed(0)
    reader = GroupedAttention(DIM, 4, keyheads, bias=bias).double()
    rolling = eq.balance.RollingQ(
        reader, query="q_proj", key="k_proj", num_heads=4, names=("a", "b"), beta=0.0, query_rows="all", heads=heads
    )
    rolling.layout(labels(7))
    tokens = torch.randn(5, 7, DIM, dtype=torch.float64)
    before = reader(tokens)
    assert rolling.end_epoch()["rotated"] == 1.0
    unfolded = reader(tokens)
    assert float((unfolded - before).detach().abs().max()) > 1e-3
    torch.testing.assert_close(eq.merge_rotations(reader)(tokens), unfolded, **EXACT)
    assert (reader.q_proj.bias is not None) == bias


def test_merge_of_partially_rotated_rows_raises():
    torch.manual_seed(0)
    reader = GroupedAttention(DIM, 2, 2)
    rolling = eq.balance.RollingQ(
        reader, query="q_proj", key="k_proj", num_heads=2, names=("a", "b"), beta=0.0, query_rows="first"
    )
    rolling.layout(labels(7))
    reader(torch.randn(5, 7, DIM))
    rolling.end_epoch()
    weight = reader.q_proj.weight.clone()
    with pytest.raises(
        ConfigError, match=r'fold: expected a rotation of all query rows.*got query_rows="first".*query_rows="all"'
    ):
        eq.merge_rotations(reader)
    assert torch.equal(reader.q_proj.weight, weight)
    assert reader.q_proj.rolling is rolling


def test_merge_is_atomic():
    model = joint_model(depth=3)
    last = build_rotated(model, query_rows="first")
    for layer, query_rows in zip(model.fusion.layers, ("all", "first"), strict=False):
        rolling = eq.balance.RollingQ(layer, query_rows=query_rows)
        rolling.load_state_dict(last.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="fold: expected a rotation of all query rows"):
        eq.merge_rotations(model)
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)


class WithoutFloat64(TorchFunctionMode):
    """Raises an error if the given tensors are converted to double on their device, as on a device without float64."""

    def __init__(self, held):
        super().__init__()
        self.held = {tensor.untyped_storage().data_ptr() for tensor in held}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        here = isinstance(args[0], torch.Tensor) and args[0].untyped_storage().data_ptr() in self.held
        if here and func is torch.Tensor.cpu:
            return args[0].clone()
        if here and (func is torch.Tensor.double or (func is torch.Tensor.to and torch.float64 in args)):
            raise TypeError("this device has no float64")
        return func(*args, **(kwargs or {}))


def test_rotate_and_merge_without_float64_support():
    model = joint_model(dtype=torch.float32)
    rolling = eq.balance.RollingQ(model.fusion.attention, beta=0.0)
    layer = model.fusion.attention.query
    with WithoutFloat64([rolling.rotation, rolling.air, layer.weight, layer.bias]):
        with pytest.raises(TypeError, match="no float64"):
            layer.weight[0].double()
        run_forward(model, [batch(dtype=torch.float32)])
        assert rolling.end_epoch()["rotated"] == 1.0
        unfolded = model.eval()(batch(dtype=torch.float32)).logits
        eq.merge_rotations(model)
    torch.testing.assert_close(model(batch(dtype=torch.float32)).logits, unfolded, **HALF_ULPS[torch.float32])
