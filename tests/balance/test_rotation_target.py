"""RollingQ on Attention layers and on named projections of any module, and errors."""

import copy

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError, ShapeError
from helpers.foreign import DecoderLayer, GroupedAttention, labels
from helpers.fusion import DIM, batch, joint_model, run_forward
from helpers.tolerance import TOL
from oracles.rollingq import means, step

EXACT = TOL[torch.float64]
NAMES = ("a", "b")


def build_balancer(reader, *, num_heads=4, **options):
    options = {"query": "q_proj", "key": "k_proj", "names": NAMES, "beta": 0.0, "query_rows": "all", **options}
    return eq.balance.RollingQ(reader, num_heads=num_heads, **options)


def split_heads(linear, tokens, width):
    return linear(tokens).unflatten(-1, (-1, width)).transpose(1, 2).detach().numpy()


@pytest.mark.parametrize("keyheads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_foreign_module_rotation_against_loops(keyheads, masked):
    torch.manual_seed(0)
    reader = GroupedAttention(DIM, 4, keyheads).double()
    rolling = build_balancer(reader)
    tokens, modality = torch.randn(5, 7, DIM, dtype=torch.float64), labels(7)
    valid = torch.ones(5, 7, dtype=torch.bool)
    if masked:
        valid[:, -1], valid[2, 1:3] = False, False
    rolling.layout(modality, valid if masked else None)
    width = DIM // 4
    query, key = split_heads(reader.q_proj, tokens, width), split_heads(reader.k_proj, tokens, width)
    result = [(query[i], key[i], modality.numpy(), valid[i].numpy(), valid[i].numpy()) for i in range(5)]
    reader(tokens, mask=valid)
    assert rolling.end_epoch()["rotated"] == 1.0
    for head in range(4):
        mean, keys, values, _ = means(result, NAMES, head)
        rotation = torch.from_numpy(step(mean, keys, values, 1.0)[3])
        torch.testing.assert_close(rolling.rotation[head], rotation, **EXACT)
    turned = split_heads(reader.q_proj, tokens, width)
    expected = torch.from_numpy(query) @ rolling.rotation
    torch.testing.assert_close(torch.from_numpy(turned), expected, **EXACT)


def test_interleaved_per_sample_labels():
    torch.manual_seed(0)
    reader = GroupedAttention(DIM, 1, 1).double()
    rolling = build_balancer(reader, num_heads=1)
    tokens = torch.randn(3, 7, DIM, dtype=torch.float64)
    modality = torch.randint(0, 2, (3, 7), generator=torch.Generator().manual_seed(0))
    rolling.layout(modality)
    query, key = split_heads(reader.q_proj, tokens, DIM), split_heads(reader.k_proj, tokens, DIM)
    every = torch.ones(7, dtype=torch.bool).numpy()
    result = [(query[i], key[i], modality[i].numpy(), every, every) for i in range(3)]
    reader(tokens)
    rolling.end_epoch()
    mean, keys, values, _ = means(result, NAMES, 0)
    torch.testing.assert_close(rolling.rotation[0], torch.from_numpy(step(mean, keys, values, 1.0)[3]), **EXACT)


@pytest.mark.parametrize("query_rows", ["first", "all"])
def test_inside_a_decoder_layer(query_rows):
    torch.manual_seed(0)
    layer = DecoderLayer(DIM, 2).double()
    rolling = build_balancer(layer, query="cross.q_proj", key="cross.k_proj", num_heads=2, query_rows=query_rows)
    rolling.layout(labels(7))
    tokens, memory = torch.randn(5, 3, DIM).double(), torch.randn(5, 7, DIM).double()
    before = layer(tokens, memory)
    assert rolling.end_epoch()["rotated"] == 1.0
    after = layer(tokens, memory)
    moved = (after - before).detach().abs().amax(dim=(0, 2)) > 1e-3
    assert moved.tolist() == [True, query_rows == "all", query_rows == "all"]
    assert next(name for name in layer.state_dict() if "rolling" in name).startswith("cross.q_proj.rolling.")


def test_foreign_module_copy_and_state_include_rotation():
    torch.manual_seed(0)
    reader = GroupedAttention(DIM, 4, 2)
    rolling = build_balancer(reader)
    rolling.layout(labels(7))
    tokens = torch.randn(5, 7, DIM)
    reader(tokens)
    rolling.end_epoch()
    twin, fresh = copy.deepcopy(reader), GroupedAttention(DIM, 4, 2)
    build_balancer(fresh)
    fresh.load_state_dict(reader.state_dict())
    for other in (twin, fresh):
        assert torch.equal(other.eval()(tokens), reader.eval()(tokens))
    rolling.detach()
    assert not reader.q_proj._forward_hooks
    assert not reader.k_proj._forward_hooks
    assert not torch.equal(reader(tokens), twin(tokens))


def test_detach_removes_hooks_and_buffers():
    model, plain = joint_model(), joint_model()
    rolling = eq.balance.RollingQ(model.fusion.attention, beta=0.0)
    run_forward(model, [batch()])
    rolling.end_epoch()
    rolling.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model.eval()(batch()).logits, plain.eval()(batch()).logits)
    rolling.detach()


def test_names_are_accepted_for_equipoise_layers():
    layer = eq.nn.Attention(DIM, heads=2)
    rolling = eq.balance.RollingQ(layer, names=NAMES, query_rows="all", beta=0.0)
    layer(torch.randn(3, 5, DIM), modality=torch.tensor([0, 0, 1, 1, 1]), num_modalities=2)
    assert set(rolling.end_epoch()) == {"air", "air/a", "air/b", "spread", "rotated", "rotations"}


@pytest.mark.parametrize("names", [("left", "right"), ("image", "audio"), ("audio", "image", "text")])
def test_names_that_contradict_the_layer_raise(names):
    model = joint_model()
    with pytest.raises(
        ConfigError, match=r"the names of the layer, \('audio', 'image'\), in the same order.* got names = "
    ):
        eq.balance.RollingQ(model.fusion.attention, names=names)
    assert eq.balance.RollingQ(model.fusion.attention, names=("audio", "image")).names == ("audio", "image")


class Rotary(GroupedAttention):
    def forward(self, tokens, position_embeddings=None):
        return super().forward(tokens)


def test_rotary_positions_warn():
    with pytest.warns(UserWarning, match="Rotary seems to use rotary position embeddings"):
        build_balancer(Rotary(DIM, 4, 4))


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: eq.nn.Attention(DIM), {}, r"queries attend to two or more modalities, got names = \(\)"),
        (
            lambda: eq.nn.Attention(DIM),
            {"names": ("a",)},
            r"two or more modalities, got names = \('a',\).*Build the model",
        ),
        (lambda: nn.Linear(3, 3), {}, r"an equipoise Attention layer, or.*got Linear\. Pass query=\"q_proj\""),
        (
            lambda: GroupedAttention(DIM, 4, 4),
            {"query": "query", "key": "k_proj", "num_heads": 4, "names": NAMES},
            r"Linear named 'query' in GroupedAttention, got no such module\. Linear layers in this module: q_proj, "
            r"k_proj, v_proj",
        ),
        (
            lambda: DecoderLayer(DIM, 4),
            {"query": "cross", "key": "cross.k_proj", "num_heads": 4, "names": NAMES},
            r"a torch.nn.Linear named 'cross' in DecoderLayer, got GroupedAttention\.",
        ),
        (
            lambda: GroupedAttention(DIM, 4, 4),
            {"query": "q_proj", "key": "k_proj", "num_heads": 5, "names": NAMES},
            r"num_heads that divides the width 12 of 'q_proj', got num_heads = 5",
        ),
        (
            lambda: GroupedAttention(DIM, 4, 4),
            {"query": "q_proj", "key": "k_proj", "names": NAMES},
            r"num_heads that divides the width 12 of 'q_proj', got num_heads = None",
        ),
        (
            lambda: GroupedAttention(DIM, 4, 3),
            {"query": "q_proj", "key": "k_proj", "num_heads": 4, "names": NAMES},
            r"'k_proj' of a width that groups 4 query heads of 3, got width 9",
        ),
        (
            lambda: GroupedAttention(DIM, 4, 4),
            {"query": "q_proj", "key": "k_proj", "num_heads": 4},
            r"two or more modalities, got names = \(\)",
        ),
    ],
)
def test_unsupported_layers_raise(build, options, message):
    with pytest.raises(ConfigError, match=message):
        eq.balance.RollingQ(build(), **options)


def test_second_balancer_raises():
    model = joint_model()
    eq.balance.RollingQ(model.fusion.attention)
    with pytest.raises(
        ConfigError, match=r"a layer without a RollingQ, got a layer that already has one\. Call fold or detach"
    ):
        eq.balance.RollingQ(model.fusion.attention)


def test_missing_or_wrong_labels():
    reader, tokens = GroupedAttention(DIM, 4, 4), torch.randn(3, 7, DIM)
    rolling = build_balancer(reader)
    with pytest.raises(ConfigError, match=r"a modality label for every key, got no labels\. Call balancer.layout"):
        reader(tokens)
    rolling.layout(labels(5))
    with pytest.raises(ConfigError, match=r"a modality label for every key, got 5 labels for 7 keys"):
        reader(tokens)
    layer = eq.nn.Attention(DIM)
    eq.balance.RollingQ(layer, names=NAMES)
    with pytest.raises(ConfigError, match=r"got no labels\. Call the attention layer with modality="):
        layer(tokens)


def test_unbatched_projections():
    reader = GroupedAttention(DIM, 4, 4)
    build_balancer(reader)
    with pytest.raises(ShapeError, match=r"projections of shape \(batch, token, dim\), got \(7, 12\)"):
        reader(torch.randn(7, DIM))


def test_attention_layers_define_their_layout():
    rolling = eq.balance.RollingQ(joint_model().fusion.attention)
    with pytest.raises(
        ConfigError, match=r"RollingQ\.layout: expected a RollingQ on an external module, got one on an Attention"
    ):
        rolling.layout(labels(7))
