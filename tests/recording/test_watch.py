"""``eq.watch`` on PyTorch models: every attention implementation against explicit attention; queries, layers,
records.
"""

import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError, ShapeError
from equipoise.nn.transformer import Block
from equipoise.recording import AttentionCall
from equipoise.recording.attention_call import select_queries
from equipoise.recording.share_measurement import attention_output, explicit_attention, measure_share
from helpers.fusion import batch, joint_model
from helpers.tolerance import TOL

BATCH, HEADS, KEYS, DIM = 3, 2, 7, 10
LABELS = torch.tensor([0, 0, 1, 1, 1, -1, 0])
NAMES = ("audio", "image")
NEAR = TOL[torch.float32]


def expected_share(attention, labels=LABELS, rows=None, count=2):
    """Computes the definition in loops: mean over the counted queries of the sum over the keys of a modality."""
    size, heads, queries, keys = attention.shape
    labels = labels.expand(size, keys)
    rows = torch.ones(size, queries) if rows is None else rows
    result = torch.zeros(size, heads, count, dtype=torch.float64)
    for sample in range(size):
        for key in range(keys):
            if labels[sample, key] >= 0:
                mass = attention[sample, :, :, key].double() @ rows[sample].double()
                result[sample, :, labels[sample, key]] += (mass / rows[sample].sum()).detach()
    return result.float()


def random_values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multihead(seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(DIM, HEADS, **options)
    for name, weight in layer.named_parameters():
        if "in_proj_weight" in name:
            weight.data[: 2 * DIM] *= 4
    return layer.eval()


class ExplicitAttention(nn.Module):
    """Attention with a fused projection, as in vision transformers, computed in one of several ways."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.num_heads, self.backend, self.soft = nn.Linear(DIM, 3 * DIM), HEADS, backend, nn.Softmax(dim=-1)

    def parts(self, tokens):
        return (4 * self.qkv(tokens)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def scores(self, tokens, mask=None):
        query, key, _ = self.parts(tokens)
        scores = query @ key.transpose(-1, -2) / math.sqrt(DIM // HEADS)
        return scores if mask is None else scores + mask

    def forward(self, tokens, mask=None):
        query, key, value = self.parts(tokens)
        if self.backend == "sdpa":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        scores = self.scores(tokens, mask)
        if self.backend == "softmax":
            return scores.softmax(dim=-1) @ value
        if self.backend == "module":
            return self.soft(scores) @ value
        if self.backend == "merged heads":
            return torch.bmm(F.softmax(scores.flatten(0, 1), dim=-1), value.flatten(0, 1))
        full = (part.flatten(0, 1) for part in (query, key, value))
        mask = None if mask is None else mask.expand(len(tokens), HEADS, KEYS, KEYS).flatten(0, 1)
        return F.scaled_dot_product_attention(*full, attn_mask=mask)


def hides(kind):
    """Returns an additive mask, and the queries that count."""
    mask, rows = torch.zeros(1, 1, 1, 1), torch.ones(BATCH, KEYS)
    if kind == "padding":
        mask, rows = torch.zeros(BATCH, 1, 1, KEYS), rows.clone()
        mask[1, ..., 5:], rows[1, 5:] = -1e4, 0
    if kind == "causal":
        mask = torch.zeros(1, 1, KEYS, KEYS).masked_fill(torch.ones(KEYS, KEYS).triu(1).bool(), -math.inf)
    return mask, rows


@pytest.mark.parametrize("backend", ["sdpa", "softmax", "module", "merged heads", "merged sdpa"])
@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
def test_explicit_attention(backend, kind):
    layer, tokens = nn.ModuleDict({"attn": ExplicitAttention(backend)}), random_values(BATCH, KEYS, DIM)
    layer.forward = lambda tokens, mask: layer["attn"](tokens, mask)
    mask, rows = hides(kind)
    mask = None if kind == "none" else mask
    plain = layer(tokens, mask)
    with eq.watch(layer, modality=LABELS, names=NAMES) as record:
        watched = layer(tokens, mask)
    assert torch.equal(plain, watched)
    assert record.layers == ["attn"]
    expected = expected_share(layer["attn"].scores(tokens, mask).softmax(dim=-1), rows=rows)
    torch.testing.assert_close(record.share("attn"), expected, **NEAR)
    assert float(expected.std()) > 0.02


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 3, "vdim": 3}])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["none", "boolean", "floating", "per head", "padding", "both"])
def test_multihead(options, first, kind):
    model = multihead(batch_first=first, **options)
    tokens = random_values(BATCH, KEYS, DIM)
    source = random_values(BATCH, KEYS, 3, seed=1) if "kdim" in options else tokens
    if not first:
        tokens = tokens.transpose(0, 1)
        source = tokens if "kdim" not in options else source.transpose(0, 1)
    hidden = torch.rand(BATCH * HEADS, KEYS, KEYS, generator=torch.Generator().manual_seed(2)) < 0.3
    hidden[:, torch.arange(KEYS), torch.arange(KEYS)] = False
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1, 5:] = True
    masks = {
        "boolean": {"attn_mask": hidden[0]}, "floating": {"attn_mask": random_values(KEYS, KEYS, seed=3)},
        "per head": {"attn_mask": hidden}, "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden[0], "key_padding_mask": padding},
    }.get(kind, {})  # fmt: skip
    with torch.no_grad():
        plain, attention = model(tokens, source, source, average_attn_weights=False, **masks)
        with eq.watch(model, modality=LABELS, names=NAMES) as record:
            watched, _ = model(tokens, source, source, average_attn_weights=False, **masks)
    assert torch.equal(plain, watched)
    itself = source is tokens and kind in ("padding", "both")
    rows = (~padding).float() if itself else None
    expected = expected_share(attention[..., :KEYS], rows=rows)
    torch.testing.assert_close(record.share("MultiheadAttention"), expected, **NEAR)
    if "add_bias_kv" in options:
        added = attention[..., KEYS:].sum(-1).mean(2) + attention[..., 5].mean(2)
        if not itself:
            torch.testing.assert_close(record.special("MultiheadAttention"), added, **NEAR)


def test_unbatched_inputs_and_functional_calls():
    model, tokens = multihead(), random_values(KEYS, DIM)
    with eq.watch(model, modality=LABELS, names=NAMES) as record:
        _, attention = model(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(record.share("MultiheadAttention"), expected_share(attention[None]), **NEAR)

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ParameterDict(dict(multihead().named_parameters(recurse=False)))
            self.out = nn.Linear(DIM, DIM)

        def forward(self, tokens):
            weights = (self.inner["in_proj_weight"], self.inner["in_proj_bias"])
            options = {"training": False, "need_weights": True, "average_attn_weights": False}
            tokens = tokens[:, None]
            out = (self.out.weight, self.out.bias)
            return F.multi_head_attention_forward(
                tokens, tokens, tokens, DIM, HEADS, *weights, None, None, False, 0.0, *out, **options
            )

    pool = Pool()
    with eq.watch(pool, modality=LABELS, names=NAMES) as function:
        _, same = pool(tokens)
    torch.testing.assert_close(same, attention[None], **NEAR)
    torch.testing.assert_close(function.share("Pool"), record.share("MultiheadAttention"), **NEAR)
    assert function.backends == {"Pool": "multihead function"}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", ["fast path", "gradients", "training"])
def test_transformer_encoder(nested, norm_first, mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 11, batch_first=True, dropout=0.3, norm_first=norm_first)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested and not norm_first)
    module.train(mode == "training")
    tokens, padding = random_values(BATCH, KEYS, DIM), torch.zeros(BATCH, KEYS, dtype=torch.bool)
    # The longest sample is padded too, so packed tokens come back as fewer.
    padding[:, 6:] = padding[1, 4:] = True
    outputs, states = [], []
    with torch.set_grad_enabled(mode != "fast path"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors.*")
        for watched in (False, True):
            torch.manual_seed(4)
            if watched:
                with eq.watch(module, modality=LABELS, names=NAMES) as record:
                    outputs.append(module(tokens, src_key_padding_mask=padding))
            else:
                outputs.append(module(tokens, src_key_padding_mask=padding))
            states.append(torch.random.get_rng_state())
    assert torch.equal(*outputs)
    assert torch.equal(*states)
    assert record.layers == ["layers.0.self_attn", "layers.1.self_attn"]
    assert ("fast path" in record.backends[record.layers[0]]) == (mode == "fast path")
    first = module.eval().layers[0]
    normed = first.norm1(tokens) if norm_first else tokens
    _, attention = first.self_attn(
        normed, normed, normed, key_padding_mask=padding, average_attn_weights=False
    )  # fmt: skip
    torch.testing.assert_close(
        record.share(record.layers[0]), expected_share(attention, rows=(~padding).float()), **NEAR
    )


def test_transformer_decoder_with_memory():
    torch.manual_seed(0)
    layer = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, 11, batch_first=True), 2).eval()
    words, memory = random_values(BATCH, 5, DIM), random_values(BATCH, KEYS, DIM, seed=1)
    message = "'layers.0.self_attn' is not in the table: it has 5 keys, and modality is given for 7"
    with torch.no_grad(), pytest.warns(UserWarning, match=message):  # noqa: SIM117
        with eq.watch(layer, modality=LABELS, names=NAMES) as record:
            layer(words, memory)
    assert record.layers == ["layers.0.multihead_attn", "layers.1.multihead_attn"]
    assert record.missing["layers.0.self_attn"] == "it has 5 keys, and modality is given for 7"
    with pytest.raises(ConfigError, match=r"layers.0.self_attn', but it has 5 keys, and modality is given for 7"):
        record.share("layers.0.self_attn")


@pytest.mark.parametrize("names", [("audio",), ("audio", "image"), ("audio", "image", "text")])
def test_equipoise_layers(names):
    model, inputs = joint_model(names, depth=2).eval(), batch(names, missing=names[:2] if len(names) > 1 else ())
    with torch.no_grad():
        plain = model(inputs)
        with eq.watch(model) as record:
            watched = model(inputs)
    assert torch.equal(plain.logits, watched.logits)
    assert record.names == names
    last = record.share(record.layers[-1])
    torch.testing.assert_close(last, plain.share.float(), **NEAR)
    others = names[::-1]
    with torch.no_grad(), eq.watch(model, names=others) as turned:
        model(inputs)
    assert turned.names == others
    torch.testing.assert_close(turned.share(record.layers[-1]), last.flip(-1), **NEAR)
    message = "watch names: expected a known modality, got 'imag'"
    with torch.no_grad(), pytest.raises(ConfigError, match=message), eq.watch(model, names=("audio", "imag")):
        model(inputs)


class TransformerEncoder(nn.Module):
    """Encodes (batch, token, 3) by one block with equipoise's attention or with ``nn.MultiheadAttention``."""

    def __init__(self, own):
        super().__init__()
        self.embed = nn.Linear(3, DIM)
        self.block = Block(DIM, 2) if own else nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True)

    def forward(self, inputs):
        output = self.block(self.embed(inputs))
        return output if isinstance(output, torch.Tensor) else output.output


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("fusion", ["JointAttention", "MBT", "MMML", "MidFusion", "MODA", "Concat"])
def test_attention_in_unimodal_encoders_is_not_missing(fusion, own):
    encoders = {name: TransformerEncoder(own) for name in NAMES}
    model = eq.FusionModel(encoders, getattr(eq.fusion, fusion)(DIM), 2).eval()
    inputs = {name: random_values(BATCH, 5 + i, 3) for i, name in enumerate(NAMES)}
    with torch.no_grad(), eq.watch(model) as record:
        model(inputs)
    assert record.missing == {}
    assert record.names == NAMES
    unimodal = [f"encoders.{name}.block.{'attention' if own else 'self_attn'}" for name in NAMES]
    if own or fusion == "Concat":
        assert record.unimodal_layers[: len(NAMES)] == unimodal
        for i, layer in enumerate(unimodal):
            assert record.share(layer)[..., i].eq(1).all()
            assert record.share(layer).sum() == BATCH * 2
    if fusion != "Concat":
        assert all(name.startswith("fusion.") for name in record.layers)
        turned_names = NAMES[::-1]
        with torch.no_grad(), eq.watch(model, names=turned_names) as turned:
            model(inputs)
        assert turned.missing == {}
        assert turned.names == turned_names
        if own:
            assert turned.share(unimodal[0])[..., 1].eq(1).all()


def test_shared_encoders_are_excluded():
    encoder = TransformerEncoder(own=True)
    model = eq.FusionModel(dict.fromkeys(NAMES, encoder), eq.fusion.JointAttention(DIM), 2).eval()
    with torch.no_grad(), eq.watch(model) as record:
        model({name: random_values(BATCH, 5, 3) for name in NAMES})
    assert record.missing == {}
    assert record.layers == ["fusion.attention"]
    assert record.unimodal_layers == []


def sdpa():
    layer = nn.ModuleDict({"attn": ExplicitAttention("sdpa")})
    layer.forward = lambda tokens, mask=None: layer["attn"](tokens, mask)
    return layer


@pytest.mark.parametrize("queries", ["last", "image", "mask", "answer"])
def test_queries(queries):
    model, tokens = sdpa(), random_values(BATCH, KEYS, DIM)
    mask = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
    mask[0, ..., :2], mask[1, ..., 5:] = False, False
    attention = model["attn"].scores(tokens).masked_fill(~mask, -math.inf).softmax(dim=-1)
    chosen = random_values(BATCH, KEYS, seed=9) > 0
    rows = {"image": (LABELS == 1).expand(BATCH, KEYS), "mask": chosen}.get(queries, torch.zeros(BATCH, KEYS).bool())
    rows = rows & mask[:, 0, 0]
    if queries in ("last", "answer"):
        rows[0, 6] = rows[1, 4] = rows[2, 6] = True
    with eq.watch(model, modality=LABELS, names=NAMES, queries=chosen if queries == "mask" else queries) as record:
        model(tokens, mask)
    torch.testing.assert_close(record.share("attn"), expected_share(attention, rows=rows.float()), **NEAR)


def test_unknown_query_labels_raise():
    model, tokens = sdpa(), random_values(BATCH, KEYS, DIM)
    for unknown, message in (
        ("imag", r"watch queries: expected a known word or modality, got 'imag'. Did you mean 'image'"),
        (torch.zeros(2, 3).long(), r"expected 'all', 'last', .* or a boolean mask .*got torch.int64 of shape \(2, 3\)"),
        (3, "boolean mask .*got 3"),
    ):
        with pytest.raises(ConfigError, match=message), eq.watch(model, modality=LABELS, names=NAMES, queries=unknown):
            pytest.fail("watched")
    wrong = torch.ones(BATCH, 5).bool()
    message = r"it has \(batch, query\) = \(3, 7\), and queries is a mask of shape \(3, 5\)"
    with pytest.warns(UserWarning, match=message), eq.watch(model, modality=LABELS, queries=wrong) as record:
        model(tokens)
    with pytest.raises(ConfigError, match=message):
        record.table()
    # A sample without a recorded query has no share.
    none = torch.zeros(BATCH, KEYS).bool()
    none[0, 3] = True
    with eq.watch(model, modality=LABELS, queries=none) as record:
        model(tokens)
    assert record.share("attn").isnan().any(dim=(1, 2)).tolist() == [False, True, True]


class RepeatedLayer(nn.Module):
    """A module that attends twice per forward pass, and one that attends once."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([ExplicitAttention("sdpa"), ExplicitAttention("softmax")])

    def forward(self, tokens):
        for number in (0, 1, 0):
            self.blocks[number](tokens)


def test_layer_patterns():
    result, tokens = RepeatedLayer(), random_values(BATCH, KEYS, DIM)
    with eq.watch(result, modality=LABELS) as record:
        result(tokens)
        result(2 * tokens)
    assert record.layers == ["blocks.0", "blocks.1", "blocks.0#2"]
    assert record.names == ("0", "1")
    assert all(record.share(layer).shape == (2 * BATCH, HEADS, 2) for layer in record.layers)
    for pattern, expected in (("*.1", ["blocks.1"]), (["blocks.0#2"], ["blocks.0#2"]), ("blocks.?", None)):
        with eq.watch(result, modality=LABELS, layers=pattern) as some:
            result(tokens)
        assert some.layers == (["blocks.0", "blocks.1"] if expected is None else expected)
    message = r"watch: expected a known module for layers, got 'block'. Did you mean 'blocks'"
    with pytest.raises(ConfigError, match=message), eq.watch(result, modality=LABELS, layers="block"):
        pytest.fail("watched")
    with pytest.raises(
        ConfigError, match=r"AttentionRecord: expected a known layer, got 'blocks.2'. Did you mean .*'blocks.1' or"
    ):
        record.share("blocks.2")


def test_nested_watches_agree():
    for result in (
        sdpa(),
        RepeatedLayer(),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 11, batch_first=True), 2),
    ):
        tokens = random_values(BATCH, KEYS, DIM)
        with eq.watch(result, modality=LABELS) as outer, eq.watch(result, modality=LABELS, queries="last") as inner:
            result(tokens)
        with eq.watch(result, modality=LABELS) as alone:
            result(tokens)
        assert outer.layers == inner.layers == alone.layers
        assert all(outer.share(layer).shape == inner.share(layer).shape for layer in outer.layers)
        result.eval()
        with eq.watch(result, modality=LABELS) as outer, eq.watch(result, modality=LABELS) as inner:
            result(tokens)
        assert all(torch.equal(outer.share(layer), inner.share(layer)) for layer in outer.layers)


def test_record_contents():
    model, tokens = sdpa(), random_values(BATCH, KEYS, DIM)
    attention = model["attn"].scores(tokens).softmax(dim=-1)
    with eq.watch(model, modality=LABELS, names=NAMES, tokens=True) as record:
        model(tokens)
    share = record.share("attn")
    torch.testing.assert_close(record.special("attn"), attention[..., 5].mean(dim=2), **NEAR)
    torch.testing.assert_close(record.per_token("attn"), share / 3, **NEAR)
    torch.testing.assert_close(record.tokens("attn"), attention.mean(dim=2), **NEAR)
    assert record.sink("attn").abs().max() == 0
    assert torch.equal(record.labels("attn"), LABELS.expand(BATCH, -1))
    for reader in range(2):
        own = expected_share(attention, rows=LABELS.eq(reader).float().expand(BATCH, -1))
        torch.testing.assert_close(record.by_query("attn")[:, :, reader], own, **NEAR)
    left = attention.mean(dim=2)
    for sample, top in enumerate(left.mean(dim=1).topk(2, dim=-1).indices.tolist()):
        left[sample, :, top] = 0
    expected = expected_share(left[:, :, None]) / left.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(record.share("attn", exclude_top_k=2), expected, **NEAR)
    row = record.table()[0]
    assert row["layer"] == "attn"
    assert row["audio"] == pytest.approx(float(share[..., 0].mean()))
    assert str(record.table()).split() == [
        "layer", "audio", "image", "special", "attn", *(x for name in ("audio", "image", "special")
                                                      for x in (f"{100 * row[name]:.1f}", "%")),
    ]  # fmt: skip
    with eq.watch(model, modality=LABELS) as without:
        model(tokens)
    with pytest.raises(ConfigError, match=r"expected attention on single tokens, got a record without it.*tokens=True"):
        without.tokens("attn")


def test_views_of_a_record(monkeypatch):
    model, tokens = sdpa(), random_values(BATCH, KEYS, DIM)
    with eq.watch(model, modality=LABELS, names=NAMES) as record:
        model(tokens)
    assert repr(record) == str(record.table())
    assert record._repr_html_() == record.table()._repr_html_()
    assert "<th>layer</th><th>audio</th>" in record._repr_html_()
    monkeypatch.setitem(sys.modules, "pandas", None)
    for view in (record, record.table()):
        with pytest.raises(
            ConfigError, match=r"to_pandas: expected the package pandas, got none installed. Install it: pip"
        ):
            view.to_pandas()
    with eq.watch(model, modality=LABELS) as empty:
        pass
    assert repr(empty).startswith("AttentionRecord without attention: watch: expected")
    assert empty._repr_html_().startswith("<p>AttentionRecord without")
    with pytest.raises(ConfigError, match="the model did not run"):
        empty.to_pandas()


def test_records_as_data_frames():
    pytest.importorskip("pandas")
    model, tokens = sdpa(), random_values(BATCH, KEYS, DIM)
    with eq.watch(model, modality=LABELS, names=NAMES) as record:
        model(tokens)
    frame = record.to_pandas()
    assert list(frame.columns) == ["layer", "sample", "head", "modality", "share"]
    assert len(frame) == BATCH * HEADS * 2
    row = frame.iloc[-1]
    assert (row["sample"], row["head"], row["modality"]) == (BATCH - 1, HEADS - 1, "image")
    assert row["share"] == float(record.share("attn")[-1, -1, -1])
    assert record.table().to_pandas().loc[0, "layer"] == "attn"


def test_batches_of_different_size_and_length():
    layer = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    with eq.watch(layer, modality=LABELS, tokens=True) as record:
        for size in (5, 3):
            tokens = random_values(size, KEYS, DIM)
            layer(tokens, tokens, tokens)
    assert record.share("MultiheadAttention").shape == (8, HEADS, 2)
    shorter = random_values(2, 4, DIM)
    message = "some batches of 'MultiheadAttention' are not in the table: it has 4 keys, and modality is given for 7"
    with pytest.warns(UserWarning, match=message), eq.watch(layer, modality=LABELS) as partly:
        _ = [layer(part, part, part) for part in (tokens, shorter)]
    assert len(partly.share("MultiheadAttention")) == 3
    per_sample = torch.tensor([[0] * 7, [1] * 7, [0, 1, 0, 1, 0, 1, -1]])
    with eq.watch(layer.eval(), modality=per_sample) as rows:
        _, attention = layer(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(rows.share("MultiheadAttention"), expected_share(attention, per_sample), **NEAR)
    message = "it has batch = 2, and modality is given for 3 samples"
    with pytest.warns(UserWarning, match=message), eq.watch(layer, modality=per_sample):
        layer(tokens[:2], tokens[:2], tokens[:2])


class Linear(nn.Module):
    def forward(self, tokens):
        return tokens.relu() @ (tokens.transpose(1, 2) @ tokens)


@pytest.mark.parametrize(("layer", "message"), [
    (nn.Identity(), "got none. watch records equipoise's layers"),
    (Linear(), "got '0', but it multiplies queries with keys .* intercepted. watch records equipoise's layers"),
])  # fmt: skip
def test_attention_in_custom_code(layer, message):
    module = nn.Sequential(layer)
    with pytest.warns(UserWarning, match=message), eq.watch(module, modality=LABELS) as record:
        module(random_values(BATCH, KEYS, DIM))
    for ask in (record.table, lambda: record.share("0"), lambda: record.per_token("0"), lambda: record.special("0")):
        with pytest.raises(ConfigError, match="attention without softmax cannot be recorded"):
            ask()
    with eq.watch(module, modality=LABELS) as idle:
        pass
    with pytest.raises(ConfigError, match=r"none, because the model did not run in the block. Call the model inside"):
        idle.table()
    message = "'MultiheadAttention', but the modality of its 7 keys is unknown. Give one label for every key"
    plain, tokens = nn.MultiheadAttention(DIM, HEADS, batch_first=True), random_values(BATCH, KEYS, DIM)
    with pytest.warns(UserWarning, match=message), eq.watch(plain) as unknown:
        plain(tokens, tokens, tokens)
    with pytest.raises(ConfigError, match=message):
        unknown.share("MultiheadAttention")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_models_without_hooks_raise():
    for result, message in (
        (torch.jit.trace(Linear(), random_values(2, 3, 5)), "got a scripted one. Watch the model that was scripted"),
        ("model", r"watch: expected a torch.nn.Module, got str"),
    ):
        with pytest.raises(ConfigError, match=message), eq.watch(result, modality=LABELS):
            pytest.fail("watched")


@pytest.mark.parametrize(("labels", "names", "error", "message"), [
    (torch.zeros(7), None, ShapeError, r"expected integer labels of shape \(key,\) or \(batch, key\), got .*float32"),
    (torch.zeros(1, 2, 3).long(), None, ShapeError, r"got shape \(1, 2, 3\)"),
    (torch.tensor([-2, 0]), None, ShapeError, "expected labels >= -1, got -2"),
    (LABELS, ("audio",), ConfigError, r"expected 2 or more different names, one for each label, got \('audio',\)"),
    (LABELS, ("audio", "audio"), ConfigError, "different names"),
    (LABELS, "audio", ConfigError, r"expected a sequence of names, got 'audio'. Use \('audio',\)"),
])  # fmt: skip
def test_mismatched_labels_raise(labels, names, error, message):
    with pytest.raises(error, match=message), eq.watch(sdpa(), modality=labels, names=names):
        pytest.fail("watched")


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
def test_checkpointed_layers_are_recorded_once():
    from torch.utils.checkpoint import checkpoint

    layer, tokens = (
        nn.ModuleList([ExplicitAttention("sdpa"), ExplicitAttention("softmax")]),
        random_values(BATCH, KEYS, DIM).requires_grad_(),
    )
    layer.forward = lambda tokens: sum(
        checkpoint(part, tokens, use_reentrant=reentrant).sum()
        for part, reentrant in zip(layer, (True, False), strict=True)
    )
    layer(tokens).backward()
    gradient = tokens.grad.clone()
    tokens.grad = None
    with eq.watch(layer, modality=LABELS) as record:
        layer(tokens).backward()
    assert torch.equal(tokens.grad, gradient)
    assert [len(record.share(layer)) for layer in record.layers] == [BATCH, BATCH]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([(2, 1), (4, 2), (3, 3)]), st.integers(1, 7), st.integers(1, 11),
    st.sampled_from([None, "padding", "whole", "floating"]), st.booleans(), st.booleans(),
    st.sampled_from([None, 2.0]), st.integers(0, 99),
)  # fmt: skip
def test_share_measurement(size, heads, queries, keys, mask, causal, sinks, softcap, seed):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    query, key = 2 * draw(size, heads[0], queries, 5), 2 * draw(size, heads[1], keys, 5)
    value, shapes = (
        draw(size, heads[1], keys, 5),
        {"padding": (size, 1, 1, keys), "whole": (1, heads[0], queries, keys)},
    )
    record = None if mask is None else draw(*shapes.get(mask, (size, 1, queries, keys)))
    record = record > -0.5 if mask in shapes else record
    call = AttentionCall(
        query, key, value, mask=record, is_causal=causal, sinks=draw(heads[0]) if sinks else None, softcap=softcap
    )
    labels = torch.randint(-1, 3, (size, keys), generator=random)
    result = measure_share(call, labels, 3)
    for sample in range(size):
        for head in range(heads[0]):
            for row in range(queries):
                weights = slow_row(call, sample, head, row, heads[0] // heads[1])
                total = sum(weights.values())
                for modality in range(3):
                    own = sum(w for k, w in weights.items() if k != "sink" and labels[sample, k] == modality)
                    share = own / total if total else 0.0
                    assert float(result.share[sample, head, row, modality]) == pytest.approx(share, abs=1e-6)
                if sinks:
                    assert float(result.sink[sample, head, row]) == pytest.approx(weights["sink"] / total, abs=1e-6)
    torch.testing.assert_close(
        attention_output(call),
        torch.cat(list(explicit_attention(call)), 2) @ value.repeat_interleave(heads[0] // heads[1], 1),
        **TOL[torch.float32],
    )
    index = torch.randint(0, queries, (size, 2), generator=random)
    some = measure_share(select_queries(call, index), labels, 3).share
    full = result.share.gather(2, index[:, None, :, None].expand(-1, heads[0], -1, 3))
    torch.testing.assert_close(some, full, **TOL[torch.float32])


def slow_row(call, sample, head, row, group):
    """Returns exp(score - highest) of every visible key of a query, and of the sink."""
    scores = {}
    for index in range(call.key.shape[2]):
        score = float(call.query[sample, head, row] @ call.key[sample, head // group, index]) / math.sqrt(5)
        score = score if call.softcap is None else call.softcap * math.tanh(score / call.softcap)
        if call.mask is not None:
            here = call.mask.expand(*call.sizes)[sample, head, row, index]
            if call.mask.dtype == torch.bool and not here:
                continue
            score += 0.0 if call.mask.dtype == torch.bool else float(here)
        if not call.is_causal or index <= row:
            scores[index] = score
    if call.sinks is not None:
        scores["sink"] = float(call.sinks[head])
    highest = max(scores.values(), default=0.0)
    return {index: math.exp(score - highest) for index, score in scores.items()}
