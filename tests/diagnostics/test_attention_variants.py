"""PAI, redistribution of sinks and contrastive decoding against their formulas."""

import importlib
import math

import pytest
import torch
from transformers import LogitsProcessorList

from equipoise.diagnostics import ContrastiveDecoding, diffuse_pixels, pai, redistribute_sinks
from equipoise.errors import ConfigError
from helpers.vlms import IMAGE, family

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def replace_attention(monkeypatch, change):
    """The logits of a LLaVA whose language model computes attention from scores by ``change(scores, labels)``."""
    model, inputs = family("llava")
    model.set_attn_implementation("eager")
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    labels = (inputs["input_ids"] == IMAGE) & inputs["attention_mask"].bool()

    def attend(part, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        group = query.shape[1] // key.shape[1]
        key, value = key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
        scores = query.double() @ key.transpose(-1, -2) * scaling + attention_mask.double()
        weights = change(scores, labels[:, None, None])
        return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(module, "eager_attention_forward", attend)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("alpha", [0.7, -0.4])
def test_pai(alpha, monkeypatch):
    model, inputs = family("llava")
    with torch.no_grad():
        plain = model(**inputs).logits
        with pai(model, alpha) as change:
            changed = model(**inputs).logits
        with pai(model, 0.0):
            assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model(**inputs).logits, plain)
    assert len(change.changed) == 2

    def formula(scores, image):
        added = alpha * torch.where(image & (scores > -1e9), scores.abs(), 0.0)
        last = torch.arange(scores.shape[2])[:, None] == scores.shape[2] - 1
        return (scores + torch.where(last, added, 0.0)).softmax(-1)

    expected = replace_attention(monkeypatch, formula)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(changed[valid], expected[valid], **CLOSE)
    assert not torch.allclose(changed[:, -1], plain[:, -1], atol=1e-4)


def test_pai_in_generation_changes_every_step():
    model, inputs = family("llava")
    one = {name: value[:1] for name, value in inputs.items()}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True, "pad_token_id": 0}
    with pai(model, 0.7):
        output = model.generate(**one, **options, return_dict_in_generate=True)
    start = one["input_ids"].shape[1]
    for step, logits in enumerate(output.logits):
        ids = output.sequences[:, : start + step]
        queries = torch.zeros_like(ids, dtype=torch.bool)
        queries[:, start - 1 :] = True
        full = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad(), pai(model, 0.7, queries=queries):
            torch.testing.assert_close(model(**full).logits[:, -1], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("least", [0.0, 0.5, 0.8])
def test_sink_redistribution(least, monkeypatch):
    model, inputs = family("llava")
    sinks, fraction = (0, 5), 0.6
    with torch.no_grad():
        plain = model(**inputs).logits
        with redistribute_sinks(model, sinks, fraction=fraction, least=least) as change:
            changed = model(**inputs).logits
    assert len(change.changed) == 2

    def formula(scores, image):
        weights = scores.softmax(-1)
        sink = torch.zeros(scores.shape[-1], dtype=torch.bool)
        sink[list(sinks)] = True
        others = image & ~sink
        visual = (weights * others).sum(-1, keepdim=True)
        moved = fraction * (weights * sink).sum(-1, keepdim=True)
        chosen = (visual > 0) & (visual >= least * (weights * image).sum(-1, keepdim=True))
        gain = 1 + moved / visual.clamp(min=1e-30)
        result = torch.where(sink, (1 - fraction) * weights, torch.where(others, gain * weights, weights))
        torch.testing.assert_close(result.sum(-1)[chosen[..., 0]], torch.ones_like(result.sum(-1))[chosen[..., 0]])
        return torch.where(chosen, result, weights)

    expected = replace_attention(monkeypatch, formula)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(changed[valid], expected[valid], **CLOSE)
    assert not torch.allclose(changed[valid], plain[valid], atol=1e-4)


def test_explicit_attention_matrices():
    """A layer that computes its attention with softmax: the matrix is changed, or the reason is listed."""

    class Layer(torch.nn.Module):
        def forward(self, scores):
            return scores.softmax(-1)

    layer, scores = Layer(), torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    known = {"modality": torch.tensor([0, 0, 0, 1, 1, 1, 1]), "names": ("text", "image")}
    plain = scores.softmax(-1)
    with redistribute_sinks(layer, [0], fraction=0.6, least=0.0, **known) as change:
        weights = layer(scores)
    assert len(change.changed) == 1
    torch.testing.assert_close(weights[..., 0], 0.4 * plain[..., 0], **CLOSE)
    torch.testing.assert_close(weights[..., 1:3], plain[..., 1:3], **CLOSE)
    gain = 1 + 0.6 * plain[..., :1] / plain[..., 3:].sum(-1, keepdim=True)
    torch.testing.assert_close(weights[..., 3:], gain * plain[..., 3:], **CLOSE)
    with pytest.raises(ConfigError, match="not known"), pai(layer, **known):
        layer(scores)


def test_contrastive_decoding():
    model, inputs = family("llava")
    inputs = {name: value[:1] for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    distorted = {**inputs, "pixel_values": diffuse_pixels(inputs["pixel_values"], 500, seed=3)}
    processor = ContrastiveDecoding(model, distorted, length=length, alpha=0.8, beta=0.2)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    output = model.generate(**inputs, **options, logits_processor=LogitsProcessorList([processor]))
    ids = inputs["input_ids"]
    for _ in range(5):
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            clean, noisy = (
                model(**{**one, **more}).logits[0, -1].double().log_softmax(-1) for one in (inputs, distorted)
            )
        clean[2] = -math.inf  # The end of the sequence, which min_new_tokens forbids.
        score = 1.8 * clean - 0.8 * noisy
        score[clean.exp() < 0.2 * clean.exp().max()] = -math.inf
        ids = torch.cat([ids, score.argmax()[None, None]], dim=1)
    assert torch.equal(output, ids)


def test_diffusion_keeps_the_variance():
    pixels = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    noisy = diffuse_pixels(pixels, 500, seed=1)
    rates = [1 / (1 + math.exp(6 - 12 * t / 999)) * 0.00499 + 0.00001 for t in range(500)]
    kept = math.prod(1 - rate for rate in rates)
    assert float(noisy.var()) == pytest.approx(1, abs=0.02)
    assert float((noisy * pixels).mean()) == pytest.approx(math.sqrt(kept), abs=0.02)
    assert torch.equal(diffuse_pixels(pixels, 500, seed=1), noisy)


def run_inside(block):
    model, inputs = family("llava")
    with torch.no_grad(), block(model):
        return model(**inputs)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda model: pai(model, math.nan), "pai: expected a finite alpha, got nan"),
        (lambda model: pai(model, 1.0, "imag"), "pai: expected a known modality, got 'imag'"),
        (lambda model: redistribute_sinks(model, ()), r"redistribute_sinks: expected positions from 0.*\[\]"),
        (lambda model: redistribute_sinks(model, [0], fraction=1.0), "fraction = 1.0"),
        (lambda model: ContrastiveDecoding(model, {}, length=1), "ContrastiveDecoding: expected alpha >= 0"),
        (lambda model: diffuse_pixels(torch.ones(1), 1001), "diffuse_pixels step: expected 0 to 1000, got 1001"),
    ],
)
def test_invalid_arguments_raise(block, message):
    with pytest.raises(ConfigError, match=message):
        run_inside(block)


def fail_inside(model, inputs):
    with pai(model, 1.0):
        model(**inputs)
        raise RuntimeError("broken")


def test_state_is_restored():
    model, inputs = family("llava")
    with torch.no_grad():
        plain = model(**inputs).logits
        with pytest.raises(RuntimeError, match="broken"):
            fail_inside(model, inputs)
        assert torch.equal(model(**inputs).logits, plain)
