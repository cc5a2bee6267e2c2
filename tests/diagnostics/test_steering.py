"""Steered attention against attention written out with numbers added to its logits."""

import importlib
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise as eq
from equipoise.diagnostics.answer_likelihood import log_likelihood
from equipoise.diagnostics.logit_offsets import add_offsets, offsets_for_shares
from equipoise.errors import ConfigError, ShapeError
from equipoise.recording import AttentionCall
from equipoise.recording.attention_call import KeyOffsets
from equipoise.recording.share_measurement import attention_output, measure_share
from helpers.foreign import GroupedAttention
from helpers.fusion import batch, joint_model
from helpers.model_state import hooks
from helpers.vlms import IMAGE, family
from oracles import quag as slow

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


# One attention.


def build_case(kind, rows=40, keys=40, dtype=torch.float32):
    """(call, the mask of the oracle, options of the oracle)."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    query, key, value = normal(2, 4, rows, 8), normal(2, 2, keys, 8), normal(2, 2, keys, 8)
    mask = torch.ones(2, 1, rows, keys, dtype=torch.bool)
    mask[1, :, :, :2] = False
    options = {
        "plain": {}, "causal": {"is_causal": True}, "masked": {"mask": mask}, "padding": {"mask": mask[:, :, :1]},
        "causal and masked": {"is_causal": True, "mask": mask[:, :, :1]},
        "window": {"mask": mask & torch.ones(rows, keys, dtype=torch.bool).tril().triu(-6)},
        "added mask": {"mask": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)},
        "bias": {"mask": normal(1, 4, rows, keys)},
        "softcap": {"softcap": 1.5, "is_causal": True}, "sinks": {"sinks": normal(4), "mask": mask},
        "sinks and causal": {"sinks": normal(4), "is_causal": True}, "scale": {"scale": 0.7},
    }[kind]  # fmt: skip
    return AttentionCall(query, key, value, **options), options


KINDS = (
    "plain", "causal", "masked", "padding", "causal and masked", "window", "added mask", "bias", "softcap", "sinks",
    "sinks and causal", "scale",
)  # fmt: skip


def expected_offsets(labels, beta):
    """(batch, head, query, key) numbers for labels (batch, key) and beta (batch, head, query, group)."""
    total = torch.zeros(*beta.shape[:3], labels.shape[1], dtype=torch.float64)
    for group in range(beta.shape[3]):
        total += beta[..., group, None].double() * (labels == group)[:, None, None]
    return total


def expected_attention(call, options, numbers=0.0):
    """Attention written out in double precision, with numbers added to the logits."""
    query, key = call.query.double(), call.key.double().repeat_interleave(2, dim=1)
    scores = query @ key.transpose(-1, -2) * options.get("scale", 8**-0.5)
    if (softcap := options.get("softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + numbers
    mask = options.get("mask")
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.double()
    if options.get("is_causal"):
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if (sinks := options.get("sinks")) is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return scores.softmax(-1).nan_to_num(0.0)


LABELS = torch.tensor([[0] * 9 + [1] * 17 + [-1, 0, 1] * 4 + [0, 0], [-1, -1, 0, 1] * 10])


def label_groups(labels=LABELS, count=2):
    return torch.stack([labels == group for group in range(count)], dim=1)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 1), (2, 4, 40)], ids=["same", "by head", "by query"])
@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_added_to_the_logits(kind, sizes):
    call, options = build_case(kind)
    beta = torch.randn(*sizes, 2, generator=torch.Generator().manual_seed(1)) * 2
    changed = add_offsets(call, KeyOffsets(label_groups(), beta))
    expected = expected_attention(call, options, expected_offsets(LABELS, beta.expand(2, 4, 40, 2)))
    torch.testing.assert_close(attention_output(changed).double(), slow.output(expected, call.value), **CLOSE)
    share = torch.stack([(expected * (m == LABELS)[:, None, None]).sum(-1) for m in range(2)], -1)
    torch.testing.assert_close(measure_share(changed, LABELS, 2).share.double(), share, **CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
def test_few_queries_with_a_cache(rows):
    call, options = build_case("plain", rows=rows)
    beta = torch.tensor([1.5, -0.5]).expand(1, 1, 1, 2)
    expected = expected_attention(call, options, expected_offsets(LABELS, beta.expand(2, 4, rows, 2)))
    changed = attention_output(add_offsets(call, KeyOffsets(label_groups(), beta)))
    torch.testing.assert_close(changed.double(), slow.output(expected, call.value), **CLOSE)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_half_precision(kind):
    call, options = build_case(kind, dtype=torch.bfloat16)
    beta = torch.tensor([3.14159, -2.71828]).expand(1, 4, 1, 2)
    share = measure_share(add_offsets(call, KeyOffsets(label_groups(), beta)), LABELS, 2).share
    expected = expected_attention(call, options, expected_offsets(LABELS, beta.expand(2, 4, 40, 2)))
    reference = torch.stack([(expected * (m == LABELS)[:, None, None]).sum(-1) for m in range(2)], -1)
    torch.testing.assert_close(share.double(), reference, atol=0.01, rtol=0.02)


@pytest.mark.parametrize("goal", [[0.5], [0.2, 0.3], [0.25, 0.75]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_target_shares_are_reached(kind, goal):
    call, options = build_case(kind)
    chosen = label_groups(count=len(goal))
    changed = add_offsets(call, offsets_for_shares(call, chosen, torch.tensor(goal)))
    share = measure_share(changed, LABELS, 2).share
    plain = expected_attention(call, options)
    seen = torch.stack([(plain * group[:, None, None]).sum(-1) for group in label_groups().unbind(1)], -1) > 0
    rest = 1 - sum((plain * group[:, None, None]).sum(-1) for group in chosen.unbind(1))
    for index, reference in enumerate(goal):
        full = seen[..., : len(goal)].all(-1) & (rest > 1e-6 if sum(goal) < 1 else rest < 2)
        assert full.any()
        torch.testing.assert_close(
            share[..., index][full], torch.full_like(share[..., index][full], reference), **CLOSE
        )
    # Among the keys of one modality, proportions stay.
    inside = (plain * chosen[:, :1, None]).double()
    value = inside / inside.sum(-1, keepdim=True).clamp(min=1e-300)
    only = AttentionCall(changed.query, changed.key, call.value * chosen[:, 0, None, :, None], changed.mask,
                         changed.is_causal, changed.scale, changed.sinks, changed.softcap, changed.offsets)  # fmt: skip
    expected = slow.output(value, call.value) * share[..., :1].double()
    torch.testing.assert_close(attention_output(only).double(), expected, **CLOSE)


def test_unreachable_share_leaves_the_query_unchanged():
    call, options = build_case("causal")
    labels = torch.tensor([[0] * 5 + [1] * 35, [1] * 40])
    changed = add_offsets(call, offsets_for_shares(call, (labels == 1)[:, None], torch.tensor([0.5])))
    share = measure_share(changed, labels, 2).share[..., 1]
    assert bool((share[0, :, :5] == 0).all())
    torch.testing.assert_close(share[0, :, 5:], torch.full((4, 35), 0.5), **CLOSE)
    torch.testing.assert_close(share[1], torch.ones(4, 40), **CLOSE)
    torch.testing.assert_close(
        attention_output(changed)[1].double(),
        slow.output(expected_attention(call, options), call.value)[1], **CLOSE,
    )  # fmt: skip


def test_explicit_attention_matrix_is_reweighted():
    call, options = build_case("masked")
    attention = expected_attention(call, options)
    beta = torch.tensor([2.0, -3.0]).expand(2, 4, 40, 2)
    blank = call.query[..., :0]
    changed = add_offsets(AttentionCall(blank, blank, blank, attention=attention), KeyOffsets(label_groups(), beta))
    torch.testing.assert_close(
        changed.attention, expected_attention(call, options, expected_offsets(LABELS, beta)), **CLOSE
    )


@pytest.mark.parametrize("rows", [1, 40])
def test_gradients_flow(rows):
    call, _ = build_case("causal", dtype=torch.float64)
    for tensor in (call.query, call.key, call.value):
        tensor.requires_grad_()
    beta = torch.tensor([2.0, -1.0]).expand(2, 4, rows, 2).double()
    ours = torch.autograd.grad(attention_output(add_offsets(call, KeyOffsets(label_groups(), beta))).square().sum(),
                               (call.query, call.key, call.value))  # fmt: skip
    key, value = (t.repeat_interleave(2, 1) for t in (call.key, call.value))
    scores = call.query @ key.transpose(-1, -2) * 8**-0.5 + expected_offsets(LABELS, beta.expand(2, 4, 40, 2))
    output = scores.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -math.inf).softmax(-1) @ value
    theirs = torch.autograd.grad(output.square().sum(), (call.query, call.key, call.value))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


# Hugging Face.


class Eager:
    """Eager attention of a language model with numbers added to the logits, in double precision."""

    def __init__(self, labels, beta, heads=None, layers=None, queries=None):
        self.labels, self.beta, self.heads, self.layers, self.queries = labels, beta, heads, layers, queries

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **_):
        (batch, heads, rows, width), keys = query.shape, key.shape[2]
        cross = getattr(module, "is_cross", False)
        labels = F.pad(self.labels, (0, max(keys - self.labels.shape[1], 0)), value=0)
        # A sliding window has the last keys.
        labels = labels[:, -keys:] if rows < keys or labels.shape[1] > keys else labels[:, :keys]
        group = heads // key.shape[1]
        scores = query.double() @ key.double().repeat_interleave(group, 1).transpose(-1, -2)
        scores = scores * (width**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            scores = scores + attention_mask[..., :keys].double()
        if (self.layers is None or module.layer_idx in self.layers) and not cross:
            number = self.beta * (labels == 1)[:, None, None].double().expand(batch, heads, rows, keys)
            if self.heads is not None:
                number = number * torch.tensor([h in self.heads for h in range(heads)])[None, :, None, None]
            if self.queries is not None and rows == self.queries.shape[1]:
                number = number * self.queries[:, None, :, None]
            scores = scores + number
        output = scores.softmax(-1) @ value.double().repeat_interleave(group, 1)
        return output.to(query.dtype).transpose(1, 2).contiguous(), None


FAMILIES = {
    "llava": "llama", "qwen2_vl": "qwen2_5_vl", "gemma3": "gemma3", "qwen2_audio": "qwen2",
}  # fmt: skip


def build_softcapped():
    model, inputs = family("gemma3")
    for part in model.modules():
        if hasattr(part, "attn_logit_softcapping"):
            part.attn_logit_softcapping = 0.5
    model.config.text_config.attn_logit_softcapping = 0.5
    model.set_attn_implementation("eager")
    return model, inputs


def build_vlm(name):
    result, inputs = build_softcapped() if name == "gemma3, softcap" else family(name)
    return result.eval(), inputs


def reference_model(name, monkeypatch, inputs, **how):
    token = 92 if name == "qwen2_audio" else IMAGE
    labels = (inputs["input_ids"] == token).long().masked_fill(inputs["attention_mask"] == 0, -1)
    other, _ = build_vlm(name)
    other.set_attn_implementation("eager")
    modeling = FAMILIES[name.split(",")[0]]
    module = importlib.import_module(f"transformers.models.{modeling}.modeling_{modeling}")
    eager = Eager(labels, **how)
    original = module.eager_attention_forward

    def only_language(part, *args, **kwargs):
        encoder = "Vision" in type(part).__name__ or getattr(part, "is_causal", True) is False
        return original(part, *args, **kwargs) if encoder else eager(part, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", only_language)
    return other


def modality(name):
    return "audio" if "audio" in name else "image"


@pytest.mark.parametrize("beta", [1.5, -4.0, 30.0])
@pytest.mark.parametrize("name", [*FAMILIES, "gemma3, softcap"])
def test_language_model(name, beta, monkeypatch):
    model, inputs = build_vlm(name)
    with torch.no_grad():
        plain = model(**inputs).logits
        with eq.steer(model, **{modality(name): beta}) as result:
            logits = model(**inputs).logits
        assert len(result.changed) == 2
        assert result.missing == {}
        assert torch.equal(model(**inputs).logits, plain)
        valid = inputs["attention_mask"].bool()
        expected = reference_model(name, monkeypatch, inputs, beta=beta)(**inputs).logits
    torch.testing.assert_close(logits[valid], expected[valid], **CLOSE)
    assert not torch.allclose(logits[valid], plain[valid], atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["heads", "heads by layer", "layers", "last query", "text queries", "mask"])
def test_selected_layers_heads_and_queries(how, backend, monkeypatch):
    model, inputs = build_vlm("llava")
    model.set_attn_implementation(backend)
    ids = inputs["input_ids"]
    valid = inputs["attention_mask"].bool()
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 9] = True
    last = torch.zeros_like(first)
    last[:, -1] = True
    ours, oracle = {
        "heads": ({"heads": [0, 3]}, {"heads": [0, 3]}),
        "heads by layer": ({"heads": {"*.1.self_attn": (2,)}}, {"heads": [2], "layers": [1]}),
        "layers": ({"layers": "*.1.self_attn"}, {"layers": [1]}),
        "last query": ({"queries": "last"}, {"queries": last}),
        "text queries": ({"queries": "text"}, {"queries": (ids != IMAGE) & valid}),
        "mask": ({"queries": first}, {"queries": first}),
    }[how]
    with torch.no_grad():
        with eq.steer(model, **ours, image=2.0) as result:
            logits = model(**inputs).logits
        expected = reference_model("llava", monkeypatch, inputs, beta=2.0, **oracle)(**inputs).logits
    torch.testing.assert_close(logits[valid], expected[valid], **CLOSE)
    assert len(result.changed) == (1 if "layer" in how else 2)


@pytest.mark.parametrize(
    ("name", "cache"),
    [("llava", None), ("llava", "static"), ("qwen2_vl", None), ("gemma3", None), ("gemma3", "static")],
)
def test_generation_with_a_cache(name, cache):
    model, inputs = build_vlm(name)
    how = {
        "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, "pad_token_id": 0,
    }  # fmt: skip
    with eq.steer(model, image=2.0):
        ours = model.generate(**inputs, **how, **({"cache_implementation": cache} if cache else {}))
    # Each step equals a forward pass over the whole sequence.
    sequence = ours.sequences
    full = {**inputs, "input_ids": sequence, "attention_mask": F.pad(inputs["attention_mask"], (0, 6), value=1)}
    for types in ("token_type_ids", "mm_token_type_ids"):
        if types in full:
            full[types] = F.pad(inputs[types], (0, 6), value=0)
    with torch.no_grad(), eq.steer(model, image=2.0):
        logits = model(**full).logits
    start = inputs["input_ids"].shape[1] - 1
    for step, scores in enumerate(ours.logits):
        torch.testing.assert_close(scores, logits[:, start + step], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "whisper"])
def test_zero_offset_is_bitwise_identical(name):
    model, inputs = build_vlm(name)
    with torch.no_grad():
        plain = model(**inputs).logits
        with eq.steer(model, **{"audio" if name == "whisper" else "image": 0.0}) as result:
            assert torch.equal(model(**inputs).logits, plain)
    assert result.changed == ()


def test_cross_attention_with_labels(monkeypatch):
    from transformers.models.whisper import modeling_whisper

    model, inputs = family("whisper")
    model.eval()
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])
    known = {"modality": labels, "names": ("speech", "noise")}
    cross = "model.decoder.layers.*.encoder_attn"
    with torch.no_grad():
        plain = model(**inputs).logits
        with eq.steer(model, **known, layers=cross, noise=-2.0) as result:
            logits = model(**inputs).logits
        assert result.changed == tuple(f"model.decoder.layers.{n}.encoder_attn" for n in range(2))
        other, _ = family("whisper")
        other.set_attn_implementation("eager")
        eager, original = Eager(labels[None], -2.0), modeling_whisper.eager_attention_forward
        monkeypatch.setattr(
            modeling_whisper, "eager_attention_forward",
            lambda part, query, key, *rest, **options: (
                eager if part.is_decoder and key.shape[2] == 8 else original
            )(part, query, key, *rest, **options),
        )  # fmt: skip
        expected = other.eval()(**inputs).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert not torch.allclose(logits, plain, atol=1e-4)


def test_encoder_outputs_are_labeled_like_inputs():
    model, inputs = family("whisper")
    known = {"modality": torch.tensor([0, 0, 0, 1, 1, 1, 0, 1]), "names": ("speech", "noise")}
    cross = "model.decoder.layers.*.encoder_attn"
    results = []
    with torch.no_grad():
        encoded = model.model.encoder(inputs["input_features"])
        for given in (inputs, {"encoder_outputs": encoded, "decoder_input_ids": inputs["decoder_input_ids"]}):
            with eq.steer(model, **known, layers=cross, noise=-2.0):
                steered = model(**given).logits
            with eq.diagnostics.without_modality(model, "audio"):
                hidden = model(**given).logits
            with eq.watch(model, **known, layers=cross) as record:
                model(**given)
            with eq.watch(model) as plain:
                model(**given)
            shares = [record.share(layer) for layer in record.layers] + [plain.share(layer) for layer in plain.layers]
            results.append([steered, hidden, *shares])
    assert len(results[0]) == 8
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_keys_of_a_single_modality_raise():
    model, inputs = family("whisper")
    message = r"steer: expected attention to several modalities, with keys of 'audio', got '.*encoder_attn', but all of"
    with torch.no_grad(), pytest.raises(ConfigError, match=message), eq.steer(model, audio=1.0):
        model(**inputs)


# Other models, and watch.


class ExplicitAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = nn.Linear(12, 36)

    def forward(self, tokens):
        query, key, value = (part.unflatten(-1, (2, 6)).transpose(1, 2) for part in self.all(tokens).chunk(3, dim=-1))
        return F.softmax(query @ key.transpose(-1, -2) / 2, dim=-1) @ value


class MultiheadSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, tokens):
        return self.layer(tokens, tokens, tokens)[0]


FOREIGN = {
    "MultiheadAttention": MultiheadSelfAttention,
    "encoder": lambda: nn.TransformerEncoderLayer(12, 2, 5, batch_first=True),
    "scaled_dot_product_attention": lambda: GroupedAttention(12, 6, 3),
    "softmax": ExplicitAttention,
}
COLUMNS = torch.tensor([-1, 0, 0, 1, 1, 1, 0])
KNOWN = {"modality": COLUMNS, "names": ("audio", "image")}


def build_scene(kind):
    """(model, function that runs it, labels)."""
    torch.manual_seed(0)
    if kind == "fusion":
        model, inputs = joint_model(depth=2).eval(), batch()
        return model, lambda: model(inputs).logits, {}
    if kind in ("llava", "gemma3"):
        model, inputs = build_vlm(kind)
        return model, lambda: model(**inputs).logits, {}
    model = FOREIGN[kind]().eval()
    tokens = torch.randn(3, 7, 12)
    return model, lambda: model(tokens), KNOWN


@pytest.mark.parametrize("kind", ["fusion", "llava", "gemma3", *FOREIGN])
def test_watch_records_steered_shares_inside_and_outside(kind):
    model, run, known = build_scene(kind)
    with torch.no_grad():
        with eq.watch(model, **known) as plain:
            untouched = run()
        with eq.steer(model, **known, image=1.25):
            steered = run()
        with eq.steer(model, **known, image=1.25), eq.watch(model, **known) as inside:
            first = run()
        with eq.watch(model, **known) as around:
            with eq.steer(model, **known, image=1.25):
                second = run()
            third = run()
        assert torch.equal(run(), untouched)
    assert torch.equal(first, steered)
    assert torch.equal(second, steered)
    assert torch.equal(third, untouched)
    assert inside.layers == plain.layers == around.layers
    layer = inside.layers[0]
    half = len(around.share(layer)) // 2
    torch.testing.assert_close(inside.share(layer), around.share(layer)[:half])
    torch.testing.assert_close(plain.share(layer), around.share(layer)[half:])
    image = inside.names.index("image")
    assert bool((inside.share(layer)[..., image] > plain.share(layer)[..., image] + 0.01).all())


@pytest.mark.parametrize("kind", ["fusion", *FOREIGN])
def test_watch_records_the_target_share(kind):
    model, run, known = build_scene(kind)
    with torch.no_grad(), eq.watch(model, **known) as record, eq.steer(model, **known, share={"image": 0.6}):
        run()
    for layer in record.layers:
        share = record.share(layer)[..., record.names.index("image")]
        torch.testing.assert_close(share, torch.full_like(share, 0.6), **CLOSE)


def test_output_share_is_steered():
    model, inputs = joint_model().eval(), batch()
    with torch.no_grad(), eq.steer(model, share={"image": 0.3}):
        share = model(inputs).share
    torch.testing.assert_close(share[..., 1], torch.full_like(share[..., 1], 0.3), **CLOSE)


# What it leaves behind, and what it complains of.


def fail_after(run):
    run()
    raise RuntimeError("broken")


@pytest.mark.parametrize("kind", ["fusion", "llava", *FOREIGN])
def test_state_is_restored_after_an_exception(kind):
    from transformers import AttentionInterface

    model, run, known = build_scene(kind)
    with torch.no_grad():
        plain = run()
        before, interface = hooks(model), dict(vars(AttentionInterface))
        with pytest.raises(RuntimeError, match="broken"), eq.steer(model, **known, image=3.0):
            fail_after(run)
        assert hooks(model) == before
        assert dict(vars(AttentionInterface)) == interface
        assert torch.equal(run(), plain)
        with eq.steer(model, **known, image=3.0):
            assert not torch.equal(run(), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imag": 1.0}, "steer: expected a known modality, got 'imag'. Did you mean 'image'"),
        ({"image": math.nan}, r"steer image: expected a number from -1000 to 1000, added to the logits, got nan"),
        ({"image": "much"}, r"steer image: expected a number from -1000 to 1000, added to the logits, got 'much'"),
        ({"image": math.inf}, r"steer image: expected a number from -1000 to 1000, added to the logits, got inf"),
        ({}, "steer: expected either numbers to add to the logits or shares, got neither"),
        ({"image": 1.0, "share": {"text": 0.5}}, "steer: expected either .*, got both"),
        ({"share": 0.5}, r'steer share: expected \{name: share\}, such as \{"image": 0.5\}, got 0.5'),
        ({"share": {"image": 1.5}}, "steer share: expected a share of 'image' between 0 and 1, got 1.5"),
        ({"share": {"image": 0.8, "text": 0.3}}, "steer share: expected shares with a sum of at most 1, got 1.1"),
        ({"image": 1.0, "queries": "lats"}, "steer queries: expected a known word or modality, got 'lats'"),
        ({"image": 1.0, "heads": [4]}, r"steer heads: expected indices from 0 to 3, .*, got \[4\]"),
        ({"image": 1.0, "heads": {"*.9.*": [1]}}, "steer: expected a known module for heads"),
        ({"image": 1.0, "layers": "*.selfattn"}, "expected a known module for layers"),
    ],
    ids=str,
)  # fmt: skip
def test_errors(options, message):
    model, inputs = build_vlm("llava")
    with torch.no_grad(), pytest.raises(ConfigError, match=message), eq.steer(model, **options):
        model(**inputs)


def test_nested_contexts_raise():
    model, _ = build_vlm("llava")
    with (
        pytest.raises(ConfigError, match="steer: expected a model without another active intervention"),
        eq.steer(model, image=1.0),
        eq.steer(model, image=1.0),
    ):
        raise AssertionError("never reached")


def test_context_without_forward_pass_warns():
    model, _ = build_vlm("llava")
    with pytest.raises(ConfigError, match="got a model that was not called"), eq.steer(model, image=1.0):
        pass


def test_dose_response():
    model, inputs = build_vlm("llava")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    rows = eq.diagnostics.dose_response(model, inputs, labels, "image", betas=(-2.0, 0.0, 2.0), layers="*.1.self_attn")
    assert [row["beta"] for row in rows] == [-2.0, 0.0, 2.0]
    with torch.no_grad():
        plain, tokens = log_likelihood(model, inputs, labels)
    assert rows[1]["log_likelihood"] == plain
    assert {row["tokens"] for row in rows} == {tokens}
    shares = [row["share"] for row in rows]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < shares[2]
    with torch.no_grad(), eq.steer(model, image=2.0, layers="*.1.self_attn"):
        assert log_likelihood(model, inputs, labels)[0] == pytest.approx(rows[2]["log_likelihood"], abs=1e-6)
    with pytest.raises(ShapeError, match=r"dose_response labels: expected \(batch, token\), got \(13,\)"):
        eq.diagnostics.dose_response(model, inputs, labels[0], "image")
    with pytest.raises(ConfigError, match="dose_response betas: expected one or more numbers, got \\(\\)"):
        eq.diagnostics.dose_response(model, inputs, labels, "image", betas=())
