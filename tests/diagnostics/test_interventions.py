"""Hidden and averaged modalities in whole models, against attention written out in copies of them."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise as eq
from equipoise.diagnostics.interventions import with_quag, without_modality
from equipoise.diagnostics.modality_masking import mask_modality
from equipoise.errors import ConfigError
from helpers.explicit_attention import intervened, with_explicit_attention
from helpers.foreign import GroupedAttention
from helpers.fusion import DIM, batch, joint_model
from helpers.model_state import hooks
from helpers.steps import attention_model
from helpers.tasks import batch_for
from helpers.tolerance import TOL
from helpers.vlms import IMAGE, family
from oracles import quag as slow

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
NAMES = ("audio", "image", "text")


def fusions(count):
    return {
        "joint": lambda: eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, cls_std=1.0),
        "joint, 3 layers": lambda: eq.fusion.JointAttention(DIM, heads=2, depth=3, dropout=0.0, cls_std=1.0),
        "joint, all rows": lambda: eq.fusion.JointAttention(DIM, heads=2, depth=2, dropout=0.0, shortcut=False),
        "mid": lambda: eq.fusion.MidFusion(DIM, heads=2),
        "mbt": lambda: eq.fusion.MBT(DIM, heads=2, depth=2),
        "mbt, cross": lambda: eq.fusion.MBT(DIM, heads=2, depth=2, exchange="cross"),
    }[count]()


EVERY = ("joint", "joint, 3 layers", "joint, all rows", "mid", "mbt", "mbt, cross")


@pytest.mark.parametrize("missing", [(), ("image",)], ids=["whole", "some lack one"])
@pytest.mark.parametrize("kind", EVERY)
def test_equipoise_layers(kind, missing):
    names = NAMES if kind in ("joint", "mid") else NAMES[:2]
    model, inputs = attention_model(names, fusion=fusions(kind)).eval(), batch(names, missing=missing, size=3)
    with torch.no_grad():
        plain = model(inputs).logits
        for change, block in intervention_cases(names):
            with block(model) as result:
                logits = model(inputs).logits
            torch.testing.assert_close(logits, with_explicit_attention(model, change)(inputs).logits, **EXACT)
            assert not torch.equal(logits, plain)
            assert all(site.startswith("fusion.") for site in result.changed)
        assert torch.equal(model(inputs).logits, plain)


def intervention_cases(names):
    """(the oracle's change, the block) that act in every fusion."""
    count = len(names)
    yield ("hide", {1}), lambda made, **known: without_modality(made, "image", **known)
    for number, name in enumerate(names):
        yield (
            ("quag", number, count, "keys"),
            lambda made, name=name, **known: with_quag(made, f"avg-{name}", **known),
        )
    for cls_rows in ("keys", "skip", "all"):
        if cls_rows != "skip":
            yield (
                ("quag", "all", count, cls_rows),
                lambda made, cls_rows=cls_rows, **known: with_quag(made, "all", cls_rows=cls_rows, **known),
            )
    yield (
        ("quag", "unimodal", count, "all"),
        lambda made, **known: with_quag(made, "unimodal", cls_rows="all", **known),
    )


@pytest.mark.parametrize("operator", ["unimodal", "crossmodal"])
def test_class_row_without_keys_is_not_averaged(operator):
    model, deep, inputs = joint_model(), joint_model(depth=2), batch()
    message = f"with_quag: expected attention with quadrants of '{operator}', got none"
    with pytest.raises(ConfigError, match=message), with_quag(model, operator):
        model(inputs)
    with with_quag(deep.eval(), operator) as result:
        logits = deep(inputs).logits
    assert result.changed == ("fusion.blocks.0.attention",)
    expected = with_explicit_attention(deep, ("quag", operator, 2, "keys"))(inputs).logits
    torch.testing.assert_close(logits, expected, **EXACT)
    assert not torch.equal(logits, deep(inputs).logits)


@pytest.mark.parametrize("kind", ["joint", "joint, 3 layers", "joint, all rows", "mid"])
@pytest.mark.parametrize("names", [("audio",), ("audio", "image"), NAMES], ids=len)
def test_without_modality_equals_masking(kind, names):
    model = attention_model(names, fusion=fusions(kind), unimodal="none", task="regression").eval()
    batches = [batch_for("regression", names, seed=seed, missing=names[1:2]) for seed in range(2)]
    for name in names:
        masked = mask_modality(model, batches, modality=name)
        with without_modality(model, name) as result:
            inside = mask_modality(model, batches, modality=name)
        # Inside the block nothing of it is left to take away.
        assert inside.full == pytest.approx(masked.without[name], rel=SINGLE["rtol"])
        assert inside.full != pytest.approx(masked.full, rel=SINGLE["rtol"])
        assert len(result.changed) == {"joint": 1, "joint, 3 layers": 3}.get(kind, 2)


def test_several_modalities_at_once():
    model, inputs = joint_model(NAMES, depth=2).eval(), batch(NAMES)
    with torch.no_grad(), without_modality(model, ("audio", "text")):
        logits = model(inputs).logits
    alone = model({**inputs, "audio": None, "text": None}).logits
    torch.testing.assert_close(logits, alone, **EXACT)


def test_masked_inputs_may_be_nan():
    model, inputs = joint_model(depth=2).eval(), batch()
    broken = {**inputs, "image": torch.full_like(inputs["image"], torch.nan)}
    with torch.no_grad(), without_modality(model, "image"):
        assert torch.equal(model(broken).logits, model(inputs).logits)


class ExplicitAttention(nn.Module):
    """Attention as it is written by hand, with (batch, head) apart or in one dimension."""

    def __init__(self, dim, heads, *, flat=False, causal=False):
        super().__init__()
        self.heads, self.flat, self.causal = heads, flat, causal
        self.all = nn.Linear(dim, 3 * dim)

    def forward(self, tokens):
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.all(tokens).chunk(3, dim=-1)
        )
        if self.flat:
            query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        scores = query @ key.transpose(-1, -2) / 2
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        attention = F.softmax(scores, dim=-1)
        output = F.dropout(attention, 0.1, self.training) @ value
        return output.unflatten(0, (len(tokens), -1)) if self.flat else output


class MultiheadSelfAttention(nn.Module):
    """``nn.MultiheadAttention`` that reads itself, with projections that the oracle can take apart."""

    def __init__(self, dim, heads, **options):
        super().__init__()
        self.layer = nn.MultiheadAttention(dim, heads, **options)

    def forward(self, tokens):
        first = self.layer.batch_first
        tokens = tokens if first else tokens.transpose(0, 1)
        output = self.layer(tokens, tokens, tokens, need_weights=False)[0]
        return output if first else output.transpose(0, 1)


def expected_output(model, tokens, columns, change):
    """The model's output with its attention written out and changed."""
    if isinstance(model, MultiheadSelfAttention):
        layer = model.layer
        parts = F.linear(tokens, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
        heads, scale = layer.num_heads, None
    elif isinstance(model, ExplicitAttention):
        parts, heads, scale = model.all(tokens).chunk(3, dim=-1), model.heads, 0.5
    else:
        parts, heads, scale = (model.q_proj(tokens), model.k_proj(tokens), model.v_proj(tokens)), model.heads, None
    keyheads = [heads, *[getattr(model, "keyheads", heads)] * 2]
    query, key, value = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in zip(parts, keyheads, strict=True))
    causal = getattr(model, "causal", False)
    attention = slow.matrix(query, key, scale=scale, is_causal=causal)
    seen = slow.visible(None, causal, attention.shape)
    columns = columns.expand(len(tokens), -1)
    output = slow.output(intervened(attention, columns, columns, seen, change), value)
    if isinstance(model, ExplicitAttention):
        return output
    merged = output.transpose(1, 2).flatten(2)
    return model.layer.out_proj(merged) if isinstance(model, MultiheadSelfAttention) else merged


FOREIGN = {
    "MultiheadAttention": lambda: MultiheadSelfAttention(12, 2, batch_first=True),
    "MultiheadAttention, tokens first": lambda: MultiheadSelfAttention(12, 2),
    "scaled_dot_product_attention": lambda: GroupedAttention(12, 6, 3),
    "softmax": lambda: ExplicitAttention(12, 2),
    "softmax, causal": lambda: ExplicitAttention(12, 2, causal=True),
    "softmax, flat": lambda: ExplicitAttention(12, 2, flat=True),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_torch_models(kind):
    torch.manual_seed(0)
    result = FOREIGN[kind]().double().eval()
    tokens, columns = torch.randn(3, 7, 12, dtype=torch.float64), torch.tensor([-1, 0, 0, 1, 2, 1, 0])
    known = {"modality": columns, "names": NAMES}
    with torch.no_grad():
        plain = result(tokens)
        for change, block in intervention_cases(NAMES):
            with block(result, **known) as actual:
                output = result(tokens)
            torch.testing.assert_close(output, expected_output(result, tokens, columns, change), **EXACT)
            assert len(actual.changed) == 1
            assert actual.missing == {}
        assert torch.equal(result(tokens), plain)


def test_encoder_fast_path_is_disabled_and_restored():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 5, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).double().eval()
    tokens, columns = torch.randn(3, 7, 12, dtype=torch.float64), torch.tensor([0, 0, 1, 0, 1, 1, 1])
    hides = torch.where(columns == 1, -torch.inf, 0.0).double().expand(7, 7)
    with torch.no_grad():
        with without_modality(module, "b", modality=columns, names=("a", "b")) as result:
            output = module(tokens)
            assert not torch.backends.mha.get_fastpath_enabled()
        torch.testing.assert_close(output, module(tokens, mask=hides), **EXACT)
        assert result.changed == ("layers.0.self_attn", "layers.1.self_attn")
        with (
            pytest.raises(ConfigError, match="got none"),
            with_quag(module, "avg-c", modality=columns, names=tuple("abc")),
        ):
            module(tokens)
    assert torch.backends.mha.get_fastpath_enabled()


# Hugging Face.


class Eager:
    """Stands for the eager attention of a language model: written out, changed, in double precision."""

    def __init__(self, prompt, change):
        self.columns, self.change = prompt, change

    def __call__(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        rows, keys = query.shape[2], key.shape[2]
        columns = F.pad(self.columns, (0, max(keys - self.columns.shape[1], 0)), value=0)[:, :keys]
        mask = None if attention_mask is None else attention_mask[..., :keys]
        attention = slow.matrix(query, key, mask=mask, scale=scaling)
        seen = slow.visible(mask, False, attention.shape)
        attention = intervened(attention, columns, columns[:, -rows:], seen, self.change)
        return slow.output(attention, value).to(value.dtype).transpose(1, 2).contiguous(), None


def llava():
    model, inputs = family("llava")
    columns = (inputs["input_ids"] == IMAGE).long().masked_fill(inputs["attention_mask"] == 0, -1)
    return model, inputs, columns


CHANGES = {
    "hidden": (("hide", {1}), lambda made: without_modality(made, "image")),
    "text hidden": (("hide", {0}), lambda made: without_modality(made, "text")),
    "unimodal": (("quag", "unimodal", 2, "keys"), lambda made: with_quag(made, "unimodal")),
    "crossmodal": (("quag", "crossmodal", 2, "keys"), lambda made: with_quag(made, "crossmodal")),
    "avg-image": (("quag", 1, 2, "keys"), lambda made: with_quag(made, "avg-image")),
    "all": (("quag", "all", 2, "keys"), lambda made: with_quag(made, "all")),
}


def reference_model(monkeypatch, columns, change):
    """A copy of the same model whose eager attention is the oracle's."""
    from transformers.models.llama import modeling_llama

    other, inputs = family("llava")
    other.set_attn_implementation("eager")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", Eager(columns, change))
    return other, inputs


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CHANGES)
def test_vision_language_model(name, backend, monkeypatch):
    model, inputs, columns = llava()
    model.set_attn_implementation(backend)
    change, block = CHANGES[name]
    with torch.no_grad():
        plain = model(**inputs).logits
        with block(model) as result:
            logits = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)
        assert result.changed == tuple(f"model.language_model.layers.{n}.self_attn" for n in range(2))
        other, _ = reference_model(monkeypatch, columns, change)
        valid = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits[valid], other(**inputs).logits[valid], **SINGLE)
    assert not torch.allclose(logits[valid], plain[valid], **SINGLE)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["hidden", "crossmodal", "all"])
def test_generation_with_a_cache(name, cache, monkeypatch):
    model, inputs, columns = llava()
    change, block = CHANGES[name]
    how = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, "pad_token_id": 0,
    }  # fmt: skip
    with block(model) as result:
        ours = model.generate(**inputs, **how, **({"cache_implementation": cache} if cache else {}))
    assert len(result.changed) == 2
    other, _ = reference_model(monkeypatch, columns, change)
    theirs = other.generate(**inputs, **how)
    for step, expected in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(step, expected, **SINGLE)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == 5


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl", "blip2", "qwen2_audio", "idefics3"])
def test_hidden_modality_has_no_influence_in_other_families(name):
    model, inputs = family(name)
    modality = "audio" if "audio" in name else "image"
    values = "input_features" if modality == "audio" else "pixel_values"
    moved = {**inputs, values: inputs[values] + 1}
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits[:, -1], model(**moved).logits[:, -1])
        with without_modality(model, modality) as result:
            assert torch.equal(model(**inputs).logits[:, -1], model(**moved).logits[:, -1])
    assert len(result.changed) == 2


def test_cross_attention():
    model, inputs = family("whisper")
    self_attention, cross = (
        tuple(f"model.decoder.layers.{n}.{kind}" for n in range(2)) for kind in ("self_attn", "encoder_attn")
    )
    with torch.no_grad():
        plain = model(**inputs).logits
        with without_modality(model, "audio") as result:
            deaf = model(**inputs).logits
            assert torch.equal(deaf, model(**{**inputs, "input_features": inputs["input_features"] + 1}).logits)
        assert result.changed == cross
        for operator, changed in (("avg-audio", cross), ("unimodal", self_attention), ("crossmodal", cross)):
            with with_quag(model, operator) as result:
                assert not torch.equal(model(**inputs).logits, plain)
            assert result.changed == changed
            assert result.missing == {}


# What it leaves behind, and what it complains of.


class Broken(nn.Module):
    def forward(self, values):
        raise RuntimeError("broken")


@pytest.mark.parametrize("ends", ["well", "with a user's error", "with the model's error"])
@pytest.mark.parametrize("block", [lambda m: without_modality(m, "image"), lambda m: with_quag(m, "all")])
def test_model_state_is_restored(block, ends):
    model = joint_model(depth=2, dropout=0.5).train()
    model.fusion.eval()
    model(batch()).logits.sum().backward()
    kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    if ends == "with the model's error":
        model.head = Broken()
        kept = kept[: len(list(model.parameters()))]
    before = hooks(model), [m.training for m in model.modules()], torch.random.get_rng_state().tolist()
    if ends == "well":
        with torch.no_grad(), block(model):
            model.eval()(batch())
        model.train().fusion.eval()
    elif ends == "with a user's error":
        with pytest.raises(eq.EquipoiseError), torch.no_grad(), block(model):
            model({"audio": torch.zeros(2, 7, 3)})
    else:
        with pytest.raises(RuntimeError, match="broken"), torch.no_grad(), block(model):
            model(batch())
    assert (hooks(model), [m.training for m in model.modules()], torch.random.get_rng_state().tolist()) == before
    if ends != "with the model's error":
        assert all((a is None) == (p.grad is None) for a, p in zip(kept, model.parameters(), strict=True))
    # Another block finds the model free.
    if ends != "with the model's error":
        with torch.no_grad(), block(model):
            model(batch())


@pytest.mark.parametrize("fails", [False, True])
def test_transformers_state_is_restored(fails):
    from transformers import AttentionInterface

    model, inputs, _ = llava()
    # transformers has hooks of its own, from the first pass on.
    model(**inputs)
    before, interface = hooks(model), dict(vars(AttentionInterface))
    if fails:
        model.lm_head = Broken()
        with pytest.raises(RuntimeError, match="broken"), without_modality(model, "image"):
            model(**inputs)
        return
    with torch.no_grad(), without_modality(model, "image"):
        model(**inputs)
    assert hooks(model) == before
    assert dict(vars(AttentionInterface)) == interface


def test_errors():
    model, inputs = joint_model(), batch()
    with (
        pytest.raises(ConfigError, match=r"without_modality: expected a known modality, got 'imag'. Did you mean"),
        without_modality(model, "imag"),
    ):
        model(inputs)
    vlm, prompt, _ = llava()
    with (
        pytest.raises(ConfigError, match=r"without_modality: expected a known modality, got 'audio'. Choose one of"),
        without_modality(vlm, "audio"),
    ):
        raise AssertionError("never reached")
    with (
        pytest.raises(ConfigError, match=r"with_quag: expected a known operator, got 'avg-audio'. Did you mean 'avg-"),
        with_quag(vlm, "avg-audio"),
    ):
        raise AssertionError("never reached")
    with (
        pytest.raises(ConfigError, match=r"quag: expected a known cls_rows, got 'none'"),
        with_quag(model, "all", cls_rows="none"),
    ):
        raise AssertionError("never reached")
    message = (
        r"without_modality: expected attention with keys of 'image', got a model that was not called. Call the model"
    )
    with pytest.raises(ConfigError, match=message), without_modality(model, "image"):
        pass
    words = {"input_ids": prompt["input_ids"].clamp(max=80), "attention_mask": prompt["attention_mask"]}
    message = r"expected attention with keys of 'image', got none. Check that the batch"
    with pytest.raises(ConfigError, match=message), torch.no_grad(), without_modality(vlm, "image"):
        vlm(**words)


def test_unsupported_attention_raises():
    static, inputs = attention_model(fusion=eq.fusion.Concat(DIM)), batch()
    message = r"with_quag: expected attention with quadrants of 'all', got no attention whose keys have known .* Static"
    with pytest.raises(ConfigError, match=message), with_quag(static, "all"):
        static(inputs)
    layer, tokens, short = (
        FOREIGN["scaled_dot_product_attention"](),
        torch.zeros(3, 7, 12),
        torch.tensor([0, 0, 1, 1, 1]),
    )
    message = r"got 'GroupedAttention', but it has 7 keys, and modality is given for 5. Give one label for each key"
    with pytest.raises(ConfigError, match=message), without_modality(layer, "0", modality=short):
        layer(tokens)
    message = (
        r"without_modality changed only some of the calls of 'GroupedAttention', "
        r"but it has 7 keys, and modality is given"
    )
    block = contextlib.ExitStack()
    result = block.enter_context(without_modality(layer, "0", modality=short))
    layer(tokens[:, :5])
    layer(tokens)
    with pytest.warns(UserWarning, match=message):
        block.close()
    assert result.changed == ("GroupedAttention",)
    assert list(result.missing) == ["GroupedAttention"]
    clip, prompt = family("clip")
    message = "attention with keys of 'image', got unimodal encoders only. They do not attend"
    with pytest.raises(ConfigError, match=message), torch.no_grad(), without_modality(clip, "image"):
        clip(**prompt)


def test_queries_of_unknown_modality():
    model, inputs = attention_model(NAMES, fusion=eq.fusion.MMML(DIM, heads=2)).eval(), batch(NAMES)
    message = (
        r"with quadrants of 'crossmodal', got '.*', but the modality of its queries is not known \(2 more layers\)"
    )
    with pytest.raises(ConfigError, match=message), with_quag(model, "crossmodal") as result:
        model(inputs)
    assert result.changed == ()
    plain = model(inputs).logits
    with with_quag(model, "avg-audio") as result:
        assert not torch.equal(model(inputs).logits, plain)
    assert len(result.changed) == 2


@pytest.mark.parametrize("inner", ["the model", "a part of it"])
def test_nested_interventions_raise(inner):
    model, inputs = joint_model(depth=2), batch()
    part = model if inner == "the model" else model.fusion
    message = (
        r"with_quag: expected a model without another active intervention, got one inside a block of without_modality"
    )
    with torch.no_grad(), without_modality(model, "image"):
        with pytest.raises(ConfigError, match=message), with_quag(part, "all"):
            raise AssertionError("never reached")
        model(inputs)
    with torch.no_grad(), without_modality(part, "image"):
        with pytest.raises(ConfigError, match=message), with_quag(model, "all"):
            raise AssertionError("never reached")
        model(inputs)
    other = joint_model(depth=2, seed=1)
    with torch.no_grad(), without_modality(model, "image"), with_quag(other, "all") as result:
        model(inputs), other(inputs)
    assert len(result.changed) == 2
