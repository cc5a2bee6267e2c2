"""``eq.watch`` lists attention that is written with elementary functions in ``missing``, also beside recorded
layers.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import equipoise as eq

TOKENS = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 1])


class Layer(nn.Module):
    """A residual layer of two heads around a function of queries, keys and values."""

    def __init__(self, attend):
        super().__init__()
        self.qkv, self.attend = nn.Linear(8, 24), attend

    def forward(self, tokens):
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return tokens + self.attend(query, key, value).transpose(1, 2).flatten(2)


def normalized(weights):
    return weights / weights.sum(dim=-1, keepdim=True)


def exponential(query, key, value):
    return normalized((query @ key.mT).exp()) @ value


def stable(query, key, value):
    scores = query @ key.mT / 2
    return normalized((scores - scores.amax(dim=-1, keepdim=True)).exp()) @ value


def in_place(query, key, value):
    weights = query @ key.mT
    weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(dim=-1, keepdim=True)) @ value


def normalized_last(query, key, value):
    weights = (query @ key.mT).exp()
    return (weights @ value) / weights.sum(dim=-1, keepdim=True)


def log_softmax(query, key, value):
    return (query @ key.mT).log_softmax(-1).exp() @ value


def einsum(query, key, value):
    return torch.einsum("bhqk,bhkd->bhqd", normalized(torch.einsum("bhqd,bhkd->bhqk", query, key).exp()), value)


def merged_heads(query, key, value):
    query, key, merged = (part.flatten(0, 1) for part in (query, key, value))
    return torch.bmm(normalized(torch.bmm(query, key.mT).exp()), merged).view(value.shape)


def broadcast(query, key, value):
    weights = normalized((query[..., None, :] * key[..., None, :, :]).sum(-1).exp())
    return (weights[..., None] * value[..., None, :, :]).sum(-2)


def additive(query, key, value):
    return normalized((torch.tanh(query[..., None, :] + key[..., None, :, :]) @ torch.ones(4)).exp()) @ value


def chunks_of_keys(query, key, value):
    output, total = torch.zeros_like(query), torch.zeros(query.shape[:-1])
    for start in range(0, key.shape[2], 3):
        weights = (query @ key[:, :, start : start + 3].mT).exp()
        output, total = output + weights @ value[:, :, start : start + 3], total + weights.sum(-1)
    return output / total[..., None]


def written_rows(query, key, value):
    scores = torch.zeros(*query.shape[:3], key.shape[2])
    for row in range(query.shape[2]):
        scores[:, :, row] = (query[:, :, row, None] @ key.mT)[:, :, 0]
    return normalized(scores.exp()) @ value


def keys_first(query, key, value):
    return (key @ query.mT).softmax(dim=-2).mT @ value


def sigmoid(query, key, value):
    return torch.sigmoid(query @ key.mT) @ value


def linear_attention(query, key, value):
    query, key = F.elu(query) + 1, F.elu(key) + 1
    return (query @ (key.mT @ value)) / (query @ key.sum(dim=-2)[..., None])


WRITTEN = [exponential, stable, in_place, normalized_last, log_softmax, einsum, merged_heads, broadcast, additive,
           chunks_of_keys, written_rows, keys_first, sigmoid, linear_attention]  # fmt: skip


def kernel(query, key, value):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def rotated(query, key, value):
    angles = torch.arange(7).float()[:, None] * torch.tensor([1.0, 0.5, 1.0, 0.5])

    def rotate(part):
        return part * angles.cos() + torch.cat([-part[..., 2:], part[..., :2]], dim=-1) * angles.sin()

    return F.scaled_dot_product_attention(rotate(query), rotate(key), value)


def gated(query, key, value):
    gate = value.mean(dim=2, keepdim=True).sigmoid() * value.mean(dim=3, keepdim=True).sigmoid()
    return F.scaled_dot_product_attention(query, key, value * gate)


def cosine(query, key, value):
    weights = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * 10).softmax(-1)
    return F.dropout(weights, 0.1) @ value


def record_layer(attend, layers=None):
    model = nn.Sequential(Layer(F.scaled_dot_product_attention), Layer(attend))
    with (
        torch.no_grad(),
        warnings.catch_warnings(record=True) as messages,
        eq.watch(model, modality=LABELS, names=("a", "b"), layers=layers) as record,
    ):
        warnings.simplefilter("always")
        model(TOKENS)
    return record, [str(warning.message) for warning in messages if "watch:" in str(warning.message)]


@pytest.mark.parametrize("attend", WRITTEN)
def test_written_attention_is_missing(attend):
    record, messages = record_layer(attend)
    assert record.layers == ["0"]
    assert list(record.missing) == ["1"]
    assert record.missing["1"].startswith("it multiplies queries with keys and the result with values")
    assert messages == [f"watch: '1' is not in the table: {record.missing['1']}."]
    assert record_layer(attend, layers=["0*"])[0].missing == {}


@pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning")
@pytest.mark.parametrize(("attend", "name"), [
    (kernel, "_scaled_dot_product_flash_attention_for_cpu"), (flex_attention, "flex_attention"),
])  # fmt: skip
def test_kernels_that_cannot_be_intercepted_are_missing(attend, name):
    record, messages = record_layer(attend)
    assert record.layers == ["0"]
    assert record.missing == {"1": f"its function '{name}' cannot be intercepted"}
    assert len(messages) == 1


@pytest.mark.parametrize("attend", [rotated, gated, cosine, torch.ops.aten.scaled_dot_product_attention])
def test_recorded_attention_is_not_missing(attend):
    record, messages = record_layer(attend)
    assert (record.layers, record.missing, messages) == (["0", "1"], {}, [])


class MixedAttention(nn.Module):
    """One module with a recorded attention and a written one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(F.scaled_dot_product_attention), Layer(stable)

    def forward(self, tokens):
        return self.second.forward(self.first.forward(tokens))


def test_both_kinds_in_one_module():
    model = MixedAttention()
    message = "some batches of 'MixedAttention' are not in the table"
    with pytest.warns(UserWarning, match=message), eq.watch(model, modality=LABELS, names=("a", "b")) as record:
        model(TOKENS)
    assert (record.layers, list(record.missing)) == (["MixedAttention"], ["MixedAttention"])


class AttentionPool(nn.Module):
    def forward(self, tokens):
        return (tokens.mean(-1).softmax(1)[..., None] * tokens).sum(1)


def test_attention_pools_are_missing():
    model = nn.Sequential(Layer(F.scaled_dot_product_attention), AttentionPool())
    message = "no attention was intercepted"
    with pytest.warns(UserWarning, match=message), eq.watch(model, modality=LABELS, names=("a", "b")) as record:
        model(TOKENS)
    assert list(record.missing) == ["1"]


class JoinedLayers(nn.Module):
    """A model of equipoise beside layers with attention of their own."""

    def __init__(self):
        super().__init__()
        encoders = {name: nn.Linear(3, 8) for name in ("a", "b")}
        self.model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        self.blocks = nn.Sequential(
            Layer(F.scaled_dot_product_attention), Layer(stable), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        )

    def forward(self, inputs):
        return self.model(inputs), self.blocks(TOKENS)


def test_other_layers_beside_a_fusion_are_missing():
    model = JoinedLayers().eval()
    message = "'blocks.0' is not in the table: the modality of its 7 keys is unknown"
    with pytest.warns(UserWarning, match=message), torch.no_grad(), eq.watch(model) as record:
        model({name: torch.ones(2, 4, 3) for name in ("a", "b")})
    assert record.layers == ["model.fusion.attention"]
    assert list(record.missing) == ["blocks.0", "blocks.1", "blocks.2.self_attn"]
