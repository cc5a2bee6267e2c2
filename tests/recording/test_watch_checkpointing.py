"""``eq.watch`` with activation checkpointing: recomputation in the backward pass is not recorded twice."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import equipoise as eq
from helpers.fusion import batch, joint_model

LABELS = torch.tensor([0, 0, 1, 1, -1])


@pytest.fixture(autouse=True)
def ignore_warnings():
    with warnings.catch_warnings():
        for text in (".*_register_pytree_node.*", ".*deprecated.*", ".*use_reentrant.*", ".*use_cache.*"):
            warnings.filterwarnings("ignore", message=text)
        yield


def encoder():
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(6, 2, 7, batch_first=True, dropout=0.0) for _ in range(2)]
    return nn.Sequential(*layers).train(), torch.randn(3, 5, 6, requires_grad=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_torch_layers(reentrant, full):
    result, tokens = encoder()
    with eq.watch(result, modality=LABELS) as plain:
        result(tokens).sum().backward()
    expected = [weight.grad.clone() for weight in result.parameters()]
    result.zero_grad()
    with eq.watch(result, modality=LABELS) as record:
        if full:
            output = checkpoint(result, tokens, use_reentrant=reentrant)
        else:
            output = checkpoint_sequential(result, 2, tokens, use_reentrant=reentrant)
        output.sum().backward()
    assert record.layers == plain.layers
    assert not record.missing
    for layer in plain.layers:
        assert torch.equal(record.share(layer), plain.share(layer))
    for weight, before in zip(result.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, before)


def test_equipoise_model():
    model = joint_model(dropout=0.0).train()
    inputs = batch()
    with eq.watch(model) as plain:
        model(inputs).logits.sum().backward()
    with eq.watch(model) as record:
        for _ in range(2):
            checkpoint(model, inputs, use_reentrant=False).logits.sum().backward()
    for layer in plain.layers:
        assert torch.equal(record.share(layer), plain.share(layer).repeat(2, 1, 1))


def test_backward_after_the_context():
    result, tokens = encoder()
    with eq.watch(result, modality=LABELS) as record:
        output = checkpoint(result, tokens, use_reentrant=False)
    output.sum().backward()
    assert all(len(record.share(layer)) == 3 for layer in record.layers)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "florence2", "whisper"])
def test_huggingface_gradient_checkpointing(name, reentrant):
    family = pytest.importorskip("small_vlms").family
    model, inputs = family(name)
    inputs["labels"] = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    model.train()

    def steps():
        with eq.watch(model) as record:
            for seed in range(2):
                torch.manual_seed(seed)
                model(**inputs).loss.backward()
        return record

    plain = steps()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    record = steps()
    assert record.layers == plain.layers
    for layer in plain.layers:
        torch.testing.assert_close(record.share(layer), plain.share(layer))
