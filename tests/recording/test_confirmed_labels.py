"""``ConfirmedLabels``: recording without tracing gives what recording with tracing gives."""

import warnings

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.recording import ConfirmedLabels
from equipoise.recording.confirmed_labels import label_block
from helpers.vlms import family

CONFIRMED = ("llava", "gemma3", "qwen2_vl", "internvl", "smolvlm", "qwen2_audio")
OTHERS = ("blip2", "instructblip", "mllama", "whisper", "florence2", "git")


def record(model, inputs):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with eq.watch(model) as result:
            output = model(**inputs)
    return result, next(iter(output.values()))


@pytest.mark.parametrize("name", [*CONFIRMED, *OTHERS])
def test_shares_are_those_of_traced_passes(name):
    model, inputs = family(name)
    model.eval()
    traced, logits = record(model, inputs)
    labels = ConfirmedLabels(model)
    for _ in range(2):
        with labels.repeated("kind"):
            again, repeated_logits = record(model, inputs)
        assert again.layers == traced.layers
        assert again.missing == traced.missing or not labels.is_confirmed("kind")
        for layer in traced.layers:
            assert torch.equal(again.share(layer), traced.share(layer))
        assert torch.equal(logits, repeated_logits)
    if name in CONFIRMED:
        assert labels.is_confirmed("kind")
        assert not labels.is_confirmed("another kind")


@pytest.mark.parametrize("name", CONFIRMED)
def test_hidden_modality_is_the_same(name):
    model, inputs = family(name)
    model.eval()
    medium = "audio" if "audio" in name else "image"
    outputs = []
    labels = ConfirmedLabels(model)
    for _ in range(3):
        with torch.no_grad(), labels.repeated("kind"), eq.diagnostics.without_modality(model, medium) as change:
            outputs.append((model(**inputs).logits, change.changed))
    assert labels.is_confirmed("kind")
    assert all(torch.equal(outputs[0][0], logits) and changed == outputs[0][1] for logits, changed in outputs[1:])
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, outputs[0][0])


def test_generation_is_the_same():
    model, inputs = family("llava")
    model.eval()
    labels = ConfirmedLabels(model)
    results = []
    for _ in range(3):
        with labels.repeated("kind"), eq.watch(model, queries="last") as result:
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        results.append((ids, torch.stack([result.share(layer) for layer in result.layers])))
    assert labels.is_confirmed("kind")
    assert all(torch.equal(ids, results[0][0]) and torch.equal(share, results[0][1]) for ids, share in results[1:])


def test_written_attention_is_always_traced():
    """Attention that does not run through transformers' interface is found by tracing only."""
    model, inputs = family("llava")

    class Mixer(nn.Module):
        def forward(self, hidden):
            return (hidden @ hidden.transpose(1, 2)).softmax(dim=-1) @ hidden

    layer = model.model.language_model.layers[0].mlp
    layer.down_proj = nn.Sequential(layer.down_proj, Mixer())
    model.eval()
    labels = ConfirmedLabels(model)
    with labels.repeated("kind"):
        record(model, inputs)
    assert not labels.is_confirmed("kind")


def test_error_leaves_nothing_behind():
    model, inputs = family("llava")
    labels = ConfirmedLabels(model)
    with pytest.raises(ValueError, match="image size"), labels.repeated("kind"):
        record(model, {**inputs, "pixel_values": inputs["pixel_values"][..., :3]})
    assert label_block(model) is None
    assert not labels.is_confirmed("kind")
