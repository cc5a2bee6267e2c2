"""The table of docs/own_models.md: each kind of model with each method works, or is refused with the reason shown."""

import copy
import warnings

import pytest
import torch

import equipoise as eq
from equipoise.errors import EquipoiseError
from helpers.own_models import (
    LLAVA,
    BertNet,
    EncoderNet,
    LlavaNet,
    MultiheadNet,
    TwoTowers,
    batch,
    llava_batch,
    matrix,
)  # fmt: skip

DATA = [batch(seed) for seed in range(2)]
ENCODERS = {"audio": "audio", "image": "image"}
LORA = "LLaVA of Hugging Face with LoRA"
# kind of model -> (model, encoders, attention module)
MODELS = {
    "own `nn.MultiheadAttention` fusion": (MultiheadNet, ENCODERS, "attention"),
    "`nn.TransformerEncoder`, positional tensors, tuple output": (
        EncoderNet, {"audio": "wave", "image": "pixels"}, "fusion.layers.1.self_attn",
    ),
    "two towers as in timm, dict output": (TwoTowers, {"audio": "towers.audio", "image": "towers.image"}, None),
    "BERT of Hugging Face as fusion": (BertNet, ENCODERS, "bert.encoder.layer.1.attention.self"),
    LORA: (
        LlavaNet, {"image": f"{LLAVA}multi_modal_projector", "text": f"{LLAVA}language_model.embed_tokens"},
        f"{LLAVA}language_model.layers.1.self_attn",
    ),
}  # fmt: skip


def batches(kind):
    return [llava_batch(seed) for seed in range(2)] if kind == LORA else DATA


def build_adapted(kind, **options):
    torch.manual_seed(0)
    build, encoders, _ = MODELS[kind]
    if kind == LORA:
        pytest.importorskip("peft")
        options["inputs"] = {"image": "pixel_values", "text": "input_ids"}
    return eq.adapt(build(), encoders=encoders, unimodal="train", example=batches(kind)[0], **options)


def train(adapted, balancers, steps=2):
    every = batches(LORA if isinstance(adapted.model, LlavaNet) else None)
    balancing = eq.BalancerList(adapted, balancers)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    for step in range(steps):
        data = every[step % len(every)]
        optimizer.zero_grad()
        balancing.loss(adapted(data), data["target"]).backward()
        balancing.before_step()
        optimizer.step()
    return balancing


def check_watch(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="watch: ")
        with eq.watch(build_adapted(kind)) as record:
            build_adapted(kind)
            record.session.model(batches(kind)[0])
    if not record.layers or all(layer in record.unimodal_layers for layer in record.layers):
        raise eq.errors.ConfigError(
            "watch", expected="attention over several modalities", got="attention inside encoders"
        )
    record.table()


def check_rotation(kind):
    adapted, path = build_adapted(kind), MODELS[kind][2]
    data = batches(kind)[0]
    labels = [result for result in adapted.key_labels(data).values() if isinstance(result, torch.Tensor)]
    if path is None or not labels:
        raise eq.errors.ConfigError(
            "RollingQ", expected="attention over several modalities", got="attention inside encoders"
        )
    rolling = eq.balance.RollingQ(adapted.model, module=path, names=adapted.names, beta=0.0)
    rolling.layout(labels[0])
    train(adapted, [rolling])
    assert rolling.end_epoch()["rotated"] == 1.0
    if kind == LORA:
        # The rotation is behind the rotary positions.
        with pytest.raises(EquipoiseError, match="behind the rotary positions"):
            eq.merge_rotations(adapted)
        return
    output = adapted.eval().output_of(adapted(data)).logits
    eq.merge_rotations(adapted)
    torch.testing.assert_close(adapted.output_of(adapted(data)).logits, output, rtol=1e-4, atol=1e-5)


def check_resume(kind):
    """Two steps, saving and two steps equal four steps."""
    full, first = build_adapted(kind), build_adapted(kind)
    for adapted in (full, first):
        adapted.eval().train(False)
    expected = [eq.balance.OGM(full)]
    train(full, expected, steps=4)
    balancers = [eq.balance.OGM(first)]
    train(first, balancers)
    state, kept = copy.deepcopy(first.state_dict()), balancers[0].state_dict()
    second = build_adapted(kind).eval()
    second.load_state_dict(state)
    again = [eq.balance.OGM(second)]
    again[0].load_state_dict(kept)
    train(second, again)
    for one, other in zip(full.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def check_diagnosis(kind):
    result = eq.diagnose(build_adapted(kind), batches(kind), tests=["score", "noise", "masking", "gradients"])
    assert not result.skipped


def check_noise_response(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(noise_response|watch): ")
        eq.diagnostics.noise_response(build_adapted(kind), batches(kind))


METHODS = {
    "watch": check_watch,
    "RollingQ": check_rotation,
    "OGM": lambda kind: train(adapted := build_adapted(kind), [eq.balance.OGM(adapted)]),
    "MMPareto": lambda kind: train(adapted := build_adapted(kind), [eq.balance.MMPareto(adapted)]),
    "ModalityCorruption": lambda kind: train(adapted := build_adapted(kind), [eq.balance.ModalityCorruption(adapted)]),
    "noise_response": check_noise_response,
    "diagnose": check_diagnosis,
    "save/resume": check_resume,
}


def table_cell(kind, method):
    try:
        METHODS[method](kind)
    except EquipoiseError:
        return "refused: no attention over both"
    return "works"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_documented_table_matches_behavior(kind, method):
    assert matrix()[kind][method] == table_cell(kind, method)
