"""Scores without a modality, against models that never had its tokens and against -inf in an attention written out."""

import math

import pytest
import torch

import equipoise as eq
from equipoise.diagnostics.modality_ablation import remove_modality, zero_modality
from equipoise.diagnostics.modality_masking import mask_modality
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from helpers.fusion import DIM, batch, joint_model
from helpers.fusion_cases import FUSIONS
from helpers.steps import attention_model
from helpers.tasks import TASKS, batch_for
from helpers.tolerance import TOL
from oracles.task_scores import slow_score

SINGLE = TOL[torch.float32]
HEADS = {"MulT": {"heads": 2, "width": 4}}


def build_model(kind, names, **options):
    """A model with that fusion, in evaluation mode."""
    return attention_model(names, fusion=kind(DIM, **HEADS.get(kind.__name__, {})), **options).eval()


def expected_score(model, batches, task):
    with torch.no_grad():
        logits = torch.cat([model(inputs).logits for inputs in batches])
    return slow_score(logits.tolist(), torch.cat([inputs["target"] for inputs in batches]).tolist(), task)


@pytest.mark.parametrize("kind", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("names", [("audio", "image"), ("audio", "image", "text")])
@pytest.mark.parametrize("unimodal", ["none", "ensemble"])
def test_masking_removes_the_modality_in_every_fusion(kind, names, unimodal):
    # The mean absolute error changes with every logit, unlike an accuracy.
    model = build_model(kind, names, unimodal=unimodal, task="regression")
    batches = [batch_for("regression", names, seed=seed, missing=names[:1]) for seed in range(2)]
    result = mask_modality(model, batches)
    assert result.full == pytest.approx(expected_score(model, batches, "regression"), rel=SINGLE["rtol"])
    assert set(result.without) == set(names)
    for name in names:
        gone = [{**inputs, name: None} for inputs in batches]
        assert result.without[name] == pytest.approx(expected_score(model, gone, "regression"), rel=SINGLE["rtol"])
        assert result.drop[name] == result.full - result.without[name]
        out = torch.zeros(5, dtype=torch.bool)
        masks = [{**inputs, "mask": {**inputs["mask"], name: out}} for inputs in batches]
        assert result.without[name] == pytest.approx(expected_score(model, masks, "regression"), rel=SINGLE["rtol"])


@pytest.mark.parametrize("task", TASKS)
def test_key_columns_of_minus_infinity(task):
    names = ("audio", "image", "text")
    model = attention_model(names, task=task, unimodal="none").eval()
    layer, inputs = model.fusion.attention, batch_for(task, names)
    tokens = model.encode(inputs)
    result, answers = mask_modality(model, [inputs], modality="image"), []
    with torch.no_grad():
        for sample in range(5):
            rows = torch.cat([model.fusion.cls.reshape(1, DIM), *(tokens[name].values[sample] for name in names)])
            places = [0, *(index for index, name in enumerate(names, 1) for _ in range(len(tokens[name])))]
            heads = []
            for head in range(2):
                part = slice(head * DIM // 2, (head + 1) * DIM // 2)
                query, key, value = (project(rows)[:, part] for project in (layer.query, layer.key, layer.value))
                scores = [
                    -math.inf if index == 2 else float(query[0] @ row) / math.sqrt(DIM // 2)
                    for row, index in zip(key, places, strict=True)
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                heads.append(sum(w / sum(weights) * row for w, row in zip(weights, value, strict=True)))
            answers.append(model.head(layer.out(torch.cat(heads))).tolist())
    expected = slow_score(answers, inputs["target"].tolist(), task)
    assert result.without == {"image": pytest.approx(expected, rel=SINGLE["rtol"])}


@pytest.mark.parametrize("depth", [1, 3])
def test_masked_modality_has_no_influence_at_any_depth(depth):
    model = joint_model(depth=depth)
    model.task, inputs = "regression", batch_for("regression")
    moved = {**inputs, "image": inputs["image"] * 7 + 1}
    first, second = (mask_modality(model, [part]) for part in (inputs, moved))
    assert first.without["image"] == second.without["image"]
    assert first.full != second.full
    assert first.without["audio"] != second.without["audio"]


@pytest.mark.parametrize(
    "kind", [eq.fusion.Concat, eq.fusion.Sum, eq.fusion.JointAttention], ids=lambda kind: kind.__name__
)
def test_zero_semantics(kind):
    model, inputs = build_model(kind, ("audio", "image"), task="regression", unimodal="none"), batch_for("regression")
    tokens = model.encode(inputs)
    gone = model.fuse({**tokens, "image": eq.Tokens(torch.zeros_like(tokens["image"].values))})
    result = mask_modality(model, [inputs], semantics="zero")
    assert result.semantics == "zero"
    expected = slow_score(gone.logits.tolist(), inputs["target"].tolist(), "regression")
    assert result.without["image"] == pytest.approx(expected, rel=SINGLE["rtol"])
    # A static fusion pools zeros either way; attention still spends a share on them.
    same = mask_modality(model, [inputs]).without["image"] == pytest.approx(expected, rel=SINGLE["rtol"])
    assert same == (kind is not eq.fusion.JointAttention)


def test_removed_modality_may_be_nan_and_masks_are_kept():
    model, inputs = joint_model(), batch(missing=("image",))
    broken = {**inputs, "audio": torch.full_like(inputs["audio"], math.nan)}
    with pytest.raises(NonFiniteError, match=r"mask_modality: expected logits without NaN, got NaN for 5 of 5"):
        mask_modality(model, [broken])
    tokens = model.encode(inputs)
    assert torch.equal(zero_modality(tokens, ["image"])["image"].valid(), tokens["image"].valid())
    assert model.fuse(remove_modality(model.encode(broken), ["audio"])).logits.isfinite().all()
    assert model.fuse(zero_modality(model.encode(broken), ["audio"])).logits.isfinite().all()


@pytest.mark.parametrize("semantics", ["mask", "zero"])
def test_single_modality_and_batches_with_missing_modality(semantics):
    alone, inputs = joint_model(("audio",)).eval(), batch(("audio",))
    tokens = alone.encode(inputs)["audio"].values
    left = {"mask": tokens[:, :0], "zero": torch.zeros_like(tokens)}[semantics]
    # The same prediction for all samples, from the class token and biases alone.
    logits = alone.fuse({"audio": eq.Tokens(left)}).logits.tolist()
    assert logits[0] == pytest.approx(logits[4])
    expected = slow_score(logits, inputs["target"].tolist(), "classification")
    assert mask_modality(alone, [inputs], semantics=semantics).without["audio"] == pytest.approx(expected)
    batches = [batch(), {**batch(seed=1), "image": None}]
    result = mask_modality(joint_model(), batches, modality="image", semantics=semantics)
    full = mask_modality(joint_model(), batches[:1], modality="image", semantics=semantics)
    rest = mask_modality(joint_model(), batches[1:], modality="image", semantics=semantics)
    assert rest.drop["image"] == 0
    assert result.drop["image"] == pytest.approx(full.drop["image"] / 2)


def test_encoders_run_once():
    model, calls = joint_model(("audio", "image", "text")), []
    handles = [encoder.register_forward_hook(lambda *_: calls.append(1)) for encoder in model.encoders.values()]
    mask_modality(model, [batch(("audio", "image", "text"))] * 2)
    for handle in handles:
        handle.remove()
    assert len(calls) == 6


def test_errors():
    model = joint_model()
    with pytest.raises(
        ConfigError, match=r"mask_modality: expected a known modality, got 'imag'. Did you mean 'image'"
    ):
        mask_modality(model, [batch()], modality="imag")
    with pytest.raises(
        ConfigError, match=r"mask_modality: expected a known semantics, got 'zeros'. Did you mean 'zero'"
    ):
        mask_modality(model, [batch()], semantics="zeros")
    with pytest.raises(
        ConfigError, match=r"mask_modality: expected a FusionModel, .* got Linear without names, encode"
    ):
        mask_modality(torch.nn.Linear(2, 3), [batch()])
    with pytest.raises(ShapeError, match="at least one batch, got none"):
        mask_modality(model, [])
    without = {name: value for name, value in batch().items() if name != "target"}
    with pytest.raises(ShapeError, match="mask_modality: expected a target for each of 5 samples, got 0"):
        mask_modality(model, [without])
