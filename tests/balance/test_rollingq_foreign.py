"""RollingQ on attention modules of torch, timm and Hugging Face, found by module or by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.foreign import DecoderLayer, TimmAttention
from helpers.tolerance import TOL
from oracles.rollingq import means, step

EXACT = TOL[torch.float64]
DIM, HEADS, NAMES = 12, 2, ("audio", "image")
LABELS = torch.tensor([-1, 0, 0, 0, 1, 1, 1])
EACH = torch.stack([LABELS, LABELS.flip(0), LABELS.roll(2), LABELS])


def random_tokens(seed=0, batch=4, count=7):
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build_balancer(layer, labels=LABELS, **options):
    rolling = eq.balance.RollingQ(layer, names=NAMES, beta=0.0, **options)
    rolling.layout(labels)
    return rolling


def expected_rotations(query, key, labels, valid):
    """The rotation of each head from (batch, head, token, dim) queries and keys, by the slow oracle."""
    labels = labels.expand(len(key), -1)
    result = []
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // key.shape[1])
        samples = [
            # The oracle takes the head itself.
            (
                query[i, head : head + 1].numpy(),
                key[i, shared : shared + 1].numpy(),
                labels[i].numpy(),
                valid[i].numpy(),
                valid[i].numpy() if query.shape[2] == key.shape[2] else torch.ones(query.shape[2]).bool().numpy(),
            )
            for i in range(len(key))
        ]
        mean, keys, values, _ = means(samples, NAMES, 0)
        result.append(torch.from_numpy(step(mean, keys, values, 1.0)[3]))
    return torch.stack(result)


def split_heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2).detach()


MULTIHEAD = {
    "plain": {},
    "without bias": {"bias": False},
    "three widths": {"kdim": DIM, "vdim": 5},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def build_multihead(kind="plain", *, batch_first=True):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first, dtype=torch.float64, **MULTIHEAD[kind])
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
    return layer


def call_multihead(layer, x, **options):
    value = x[..., : layer.vdim]
    if layer.batch_first:
        return layer(x, x, value, **options)
    x, value = x.transpose(0, 1), value.transpose(0, 1)
    output, weights = layer(x, x, value, **options)
    return output.transpose(0, 1), weights


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", MULTIHEAD)
@pytest.mark.parametrize("labels", [LABELS, EACH], ids=["shared", "each"])
def test_multihead_rotation_against_loops_and_merge(kind, batch_first, labels):
    layer, x = build_multihead(kind, batch_first=batch_first), random_tokens()
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[1, -2:] = True
    plain = call_multihead(layer, x, key_padding_mask=padding)[0]
    rolling = build_balancer(layer, labels)
    assert torch.equal(call_multihead(layer, x, key_padding_mask=padding)[0], plain)
    width = DIM
    weight = layer.in_proj_weight[:width] if layer.in_proj_weight is not None else layer.q_proj_weight
    key_weight = layer.in_proj_weight[width : 2 * width] if layer.in_proj_weight is not None else layer.k_proj_weight
    bias = torch.zeros(2 * width).double() if layer.in_proj_bias is None else layer.in_proj_bias[: 2 * width]
    query = split_heads(F.linear(x, weight, bias[:width]))
    key = split_heads(F.linear(x, key_weight, bias[width:]))
    before = {name: value.clone() for name, value in layer.named_parameters()}
    assert rolling.end_epoch()["rotated"] == 1.0
    torch.testing.assert_close(rolling.rotation, expected_rotations(query, key, labels, ~padding), **EXACT)
    layer.eval()
    rotated, attention = call_multihead(layer, x, key_padding_mask=padding, average_attn_weights=False)
    assert not torch.allclose(rotated, plain)
    scores = (query @ rolling.rotation) @ key.mT / key.shape[-1] ** 0.5
    if kind != "added keys":
        expected = scores.masked_fill(padding[:, None, None], -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(attention, expected, **EXACT)
    with eq.watch(layer, modality=labels, names=NAMES) as record:
        seen = call_multihead(layer, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(seen, rotated, **EXACT)
    share = torch.stack([(attention[..., :7] * (labels == m).expand(4, 7)[:, None, None]).sum(-1) for m in (0, 1)], -1)
    rows = (~padding)[:, None, :, None]
    share = (share * rows).sum(2) / rows.sum(2)
    torch.testing.assert_close(record.share("MultiheadAttention"), share.float(), **TOL[torch.float32])
    assert all(torch.equal(value, before[name]) for name, value in layer.named_parameters())
    eq.merge_rotations(layer)
    assert set(layer.state_dict()) == set(before)
    torch.testing.assert_close(call_multihead(layer, x, key_padding_mask=padding)[0], rotated, **EXACT)


def test_gradients_reach_the_parameters_of_a_rotated_multihead():
    layer, x = build_multihead(), random_tokens()
    rolling = build_balancer(layer)
    call_multihead(layer, x)
    rolling.end_epoch()
    output = call_multihead(layer, x)[0]
    (output**2).sum().backward()
    merged = eq.merge_rotations(copy.deepcopy(layer))
    merged.zero_grad()
    (call_multihead(merged, x)[0] ** 2).sum().backward()
    rotation = rolling.rotation
    weight = merged.in_proj_weight.grad[:DIM].unflatten(0, (HEADS, -1))
    torch.testing.assert_close(layer.in_proj_weight.grad[:DIM], (rotation @ weight).flatten(0, 1), **EXACT)
    torch.testing.assert_close(layer.in_proj_weight.grad[DIM:], merged.in_proj_weight.grad[DIM:], **EXACT)


def test_state_copies_and_averages_of_a_multihead():
    layer, x = build_multihead(), random_tokens()
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    rolling = build_balancer(layer)
    call_multihead(layer, x)
    rolling.end_epoch()
    layer.eval()
    expected = call_multihead(layer, x)[0]
    twin, fresh = copy.deepcopy(layer), build_multihead().eval()
    build_balancer(fresh)
    fresh.load_state_dict(layer.state_dict())
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    average.update_parameters(layer)
    for other in (twin, fresh, average.module):
        assert torch.equal(call_multihead(other, x)[0], expected)
    called = torch.func.functional_call(
        fresh,
        {**dict(layer.named_parameters()), "rolling.rotation": torch.eye(DIM // HEADS).double().repeat(HEADS, 1, 1)},
        (x, x, x),
    )
    assert torch.equal(called[0], call_multihead(build_multihead(), x)[0])
    fresh.load_state_dict({name: value for name, value in layer.state_dict().items() if "rolling" not in name})
    assert torch.equal(call_multihead(fresh, x)[0], call_multihead(build_multihead().eval(), x)[0])
    rolling.detach()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert torch.equal(call_multihead(layer, x)[0], call_multihead(build_multihead().eval(), x)[0])


def test_a_failed_forward_pass_restores_the_weights():
    layer, x = build_multihead(), random_tokens()
    rolling = build_balancer(layer)
    call_multihead(layer, x)
    rolling.end_epoch()
    for training, error in ((True, ConfigError), (False, AssertionError)):
        layer.train(training)
        with pytest.raises((error, RuntimeError)):
            layer(x, x[:, :3], x)
        assert "in_proj_weight" not in vars(layer)
    assert layer.in_proj_weight is layer._parameters["in_proj_weight"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_and_the_fast_path(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 16, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    rolling = build_balancer(encoder, module="layers.0.self_attn")
    x, padding = random_tokens(), torch.zeros(4, 7, dtype=torch.bool)
    padding[2, -1] = True
    encoder(x, src_key_padding_mask=padding)
    assert rolling.end_epoch()["rotated"] == 1.0
    slow = encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    merged = eq.merge_rotations(copy.deepcopy(encoder))
    plain = copy.deepcopy(encoder)
    with torch.no_grad():
        for padded in (padding, None):
            fast = encoder(x, src_key_padding_mask=padded)
            torch.testing.assert_close(fast, merged(x, src_key_padding_mask=padded), **EXACT)
        shown = ~padding[..., None]
        torch.testing.assert_close(slow.detach() * shown, encoder(x, src_key_padding_mask=padding) * shown, **EXACT)
        shares = []
        for model in (plain, merged):
            with eq.watch(model, modality=LABELS, names=NAMES) as record:
                model(x, src_key_padding_mask=padding)
            assert not record.missing
            shares.append(record.share("layers.0.self_attn"))
    torch.testing.assert_close(*shares, **TOL[torch.float32])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_full_pass_measures_padded_encoders():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 16, dropout=0.0, batch_first=True).double()
    encoder = nn.TransformerEncoder(layer, 1)
    rolling = build_balancer(encoder, statistics="full_pass")
    other = copy.deepcopy(encoder)
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[2, -1] = True

    wrapper = Padded(encoder, padding)
    rolling.measure(wrapper, [random_tokens()])
    rolling.end_epoch()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        twin = other.layers[0].self_attn.rolling
        twin.measure(Padded(other, padding), [random_tokens()])
        twin.end_epoch()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(rolling.rotation, twin.rotation, **EXACT)


class Padded(nn.Module):
    def __init__(self, encoder, padding):
        super().__init__()
        self.encoder, self.padding = encoder, padding

    def forward(self, x):
        return self.encoder(x, src_key_padding_mask=self.padding)


@pytest.mark.parametrize("query_rows", ["first", "all", None])
def test_fused_projections_of_timm(query_rows):
    torch.manual_seed(0)
    layer, x = TimmAttention(DIM, HEADS).double(), random_tokens()
    rolling = build_balancer(layer, query_rows=query_rows)
    assert rolling.query_rows == (query_rows or "all")
    plain = layer(x)
    query, key, _ = (split_heads(part) for part in layer.qkv(x).chunk(3, dim=-1))
    rows = torch.ones(4, 7, dtype=torch.bool)
    kept = query[:, :, :1] if query_rows == "first" else query
    rolling.end_epoch()
    torch.testing.assert_close(rolling.rotation, expected_rotations(kept, key, LABELS, rows), **EXACT)
    changed = (layer(x) - plain).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [True] + [query_rows != "first"] * 6
    if query_rows == "first":
        with pytest.raises(ConfigError, match="a rotation of all query rows"):
            eq.merge_rotations(layer)
        return
    with eq.watch(layer.eval(), modality=LABELS, names=NAMES) as record:
        rotated = layer(x)
    attention = ((query @ rolling.rotation) @ key.mT / key.shape[-1] ** 0.5).softmax(dim=-1)
    share = torch.stack([attention[..., m == LABELS].sum(-1).mean(-1) for m in (0, 1)], dim=-1)
    torch.testing.assert_close(record.share(record.layers[0]), share.float(), **TOL[torch.float32])
    torch.testing.assert_close(eq.merge_rotations(layer)(x), rotated, **EXACT)


def test_query_norms_after_the_projection():
    torch.manual_seed(0)
    layer, x = TimmAttention(DIM, HEADS, qk_norm=True).double(), random_tokens()
    rolling = build_balancer(layer)
    layer(x)
    rolling.end_epoch()
    query, key, _ = (split_heads(part) for part in layer.qkv(x).chunk(3, dim=-1))
    query, key = layer.q_norm(query).detach(), layer.k_norm(key).detach()
    valid = torch.ones(4, 7, dtype=torch.bool)
    torch.testing.assert_close(rolling.rotation, expected_rotations(query, key, LABELS, valid), **EXACT)
    with eq.watch(layer.eval(), modality=LABELS, names=NAMES) as record:
        layer(x)
    attention = ((query @ rolling.rotation) @ key.mT / key.shape[-1] ** 0.5).softmax(dim=-1)
    share = torch.stack([attention[..., m == LABELS].sum(-1).mean(-1) for m in (0, 1)], dim=-1)
    torch.testing.assert_close(record.share(record.layers[0]), share.float(), **TOL[torch.float32])
    with pytest.raises(
        ConfigError, match=r"that the query projection can contain, got one behind the norms of queries"
    ):
        eq.merge_rotations(layer)


def test_attention_inside_a_layer_is_located():
    block = nn.ModuleDict({"attn": TimmAttention(DIM, HEADS), "mlp": nn.Linear(DIM, DIM)})
    assert eq.balance.RollingQ(block, names=NAMES)._target.projection is block["attn"].qkv
    decoder = DecoderLayer(DIM, HEADS)
    assert eq.balance.RollingQ(decoder, names=NAMES)._target.projection is decoder.cross.q_proj
    layer = nn.TransformerEncoderLayer(DIM, HEADS)
    assert eq.balance.RollingQ(layer, names=NAMES)._target.projection is layer.self_attn


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            lambda: nn.TransformerDecoderLayer(DIM, HEADS),
            {},
            r"one attention module, got TransformerDecoderLayer with 2: self_attn, multihead_attn\. "
            r'Name the one to rotate: module="multihead_attn"',
        ),
        (
            lambda: nn.TransformerDecoderLayer(DIM, HEADS),
            {"module": "self_atn"},
            r"unknown module 'self_atn'|self_attn",
        ),
        (lambda: build_multihead(), {"query_rows": "first"}, r'query_rows="all" for nn.MultiheadAttention'),
        (
            lambda: nn.utils.parametrizations.weight_norm(build_multihead(), "in_proj_weight"),
            {},
            r"got a parametrized weight",
        ),
        (lambda: TimmAttention(DIM, HEADS), {"num_heads": 5}, r"'qkv' of width 30 \+ 2 \* 30"),
    ],
)
def test_unsupported_modules_raise(build, options, message):
    with pytest.raises(ConfigError, match=message):
        eq.balance.RollingQ(build(), names=NAMES, **options)


def test_mismatched_labels_raise():
    layer = build_multihead()
    build_balancer(layer, LABELS[:5])
    with pytest.raises(ConfigError, match="a modality label for every key, got 5 labels for 7 keys"):
        call_multihead(layer, random_tokens())
