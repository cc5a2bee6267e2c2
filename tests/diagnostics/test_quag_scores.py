"""Scores under QUAG, against models whose attention is written out."""

import pytest
import torch

import equipoise as eq
from equipoise.diagnostics.quag_test import quag
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from helpers.explicit_attention import with_explicit_attention
from helpers.fusion import DIM, batch, joint_model
from helpers.model_state import FailingModel, model_state
from helpers.steps import attention_model
from helpers.tasks import TASKS, batch_for
from helpers.tolerance import TOL
from oracles.task_scores import slow_score

SINGLE = TOL[torch.float32]
NAMES = ("audio", "image", "text")


def expected_score(result, batches, task, change=None):
    result = result.eval() if change is None else with_explicit_attention(result.eval(), change)
    with torch.no_grad():
        logits = torch.cat([result(inputs).logits for inputs in batches])
    return slow_score(logits.tolist(), torch.cat([inputs["target"] for inputs in batches]).tolist(), task)


def oracle_change(name, names, cls_rows="keys"):
    return ("quag", names.index(name[4:]) if name.startswith("avg-") else name, len(names), cls_rows)


@pytest.mark.parametrize(
    ("task", "names"), [*((task, NAMES[:2]) for task in TASKS), ("regression", NAMES[:1]), ("regression", NAMES)]
)
def test_against_explicit_attention(names, task):
    model = attention_model(names, fusion=eq.fusion.JointAttention(DIM, heads=2, depth=2, dropout=0.3), task=task)
    batches = [batch_for(task, names, seed=seed, missing=names[1:2]) for seed in range(2)]
    result = quag(model, batches)
    assert result.origin == pytest.approx(expected_score(model, batches, task), rel=SINGLE["rtol"])
    every = {"unimodal", "crossmodal", "all", *(f"avg-{name}" for name in names)}
    assert set(result.scores) == (every if len(names) > 1 else every - {"crossmodal"})
    for name, score in result.scores.items():
        expected = expected_score(model, batches, task, oracle_change(name, names))
        assert score == pytest.approx(expected, rel=SINGLE["rtol"])
        assert result.drops[name] == result.origin - score
        layers = [0] if name in ("unimodal", "crossmodal") else [0, 1]
        assert result.changed[name] == tuple(f"fusion.blocks.{n}.attention" for n in layers)


@pytest.mark.parametrize("cls_rows", ["keys", "skip", "all"])
def test_class_token_row(cls_rows):
    model, inputs = attention_model(task="regression").eval(), batch_for("regression")
    result = quag(model, [inputs], cls_rows=cls_rows)
    acts = {"keys": {"avg-audio", "avg-image", "all"}, "skip": set(), "all": set(result.scores)}[cls_rows]
    for name in result.scores:
        assert result.changed[name] == (("fusion.attention",) if name in acts else ())
        assert (result.drops[name] != 0) == (name in acts)
        expected = expected_score(model, [inputs], "regression", oracle_change(name, ("audio", "image"), cls_rows))
        assert result.scores[name] == pytest.approx(expected, rel=SINGLE["rtol"])
    if cls_rows == "all":
        assert result.scores["unimodal"] == result.scores["crossmodal"] == result.scores["all"]


def test_class_token_without_key():
    fusion = eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, cls_std=1.0, include_cls_key=False)
    model, inputs = attention_model(fusion=fusion, task="regression").eval(), batch_for("regression")
    result = quag(model, [inputs])
    acts = {name: bool(changed) for name, changed in result.changed.items()}
    assert acts == {"unimodal": False, "crossmodal": False, "avg-audio": True, "avg-image": True, "all": True}
    assert all((result.drops[name] != 0) == act for name, act in acts.items())


def test_selected_operators_and_single_encoder_pass():
    model, calls = joint_model(NAMES, depth=2), []
    handles = [encoder.register_forward_hook(lambda *_: calls.append(1)) for encoder in model.encoders.values()]
    result = quag(model, iter([batch(NAMES), batch(NAMES, seed=1)]), operators=("avg-text", "unimodal"))
    for handle in handles:
        handle.remove()
    assert list(result.scores) == list(result.drops) == list(result.changed) == ["avg-text", "unimodal"]
    assert len(calls) == 6
    # A batch that lacks the modality has nothing to average.
    lacking = quag(model, [{**batch(NAMES), "text": None}], operators=("avg-text",))
    assert lacking.changed == {"avg-text": ()}
    assert lacking.drops == {"avg-text": 0.0}


@pytest.mark.parametrize("kind", [eq.fusion.MidFusion, eq.fusion.MBT, eq.fusion.MMML])
def test_other_fusions_with_attention(kind):
    model = attention_model(NAMES, fusion=kind(DIM, heads=2), task="regression").eval()
    result = quag(model, [batch_for("regression", NAMES)], operators=("avg-image",))
    assert result.changed["avg-image"]
    assert result.drops["avg-image"] != 0


def test_errors():
    model = joint_model()
    for kind in (eq.fusion.Concat, eq.fusion.Sum):
        message = rf"quag: expected a fusion with attention over keys .* got {kind.__name__}, which has none. Static"
        with pytest.raises(ConfigError, match=message):
            quag(attention_model(fusion=kind(DIM)), [batch()])
    with pytest.raises(ConfigError, match=r"quag: expected a FusionModel, .* got Linear without names, encoders"):
        quag(torch.nn.Linear(2, 3), [batch()])
    with pytest.raises(ConfigError, match=r"quag: expected a known operator, got 'avg-imag'. Did you mean 'avg-image'"):
        quag(model, [batch()], operators=["avg-imag"])
    with pytest.raises(ConfigError, match=r"quag: expected a known cls_rows, got 'some'"):
        quag(model, [batch()], cls_rows="some")
    with pytest.raises(ShapeError, match="at least one batch, got none"):
        quag(model, [])
    without = {name: value for name, value in batch().items() if name != "target"}
    with pytest.raises(ShapeError, match="quag: expected a target for each of 5 samples, got 0"):
        quag(model, [without])
    broken = {**batch(), "audio": torch.full((5, 7, 3), torch.nan).double()}
    with pytest.raises(NonFiniteError, match="quag: expected logits without NaN, got NaN for 5 of 5"):
        quag(model, [broken])


@pytest.mark.parametrize("ends", ["well", "with a user's error", "with the model's error"])
def test_model_state_is_restored(ends):
    model, batches = joint_model(depth=2, dropout=0.5).train(), [batch(seed=seed) for seed in range(2)]
    model.fusion.eval()
    model.loss(model(batches[0]).logits, batches[0]["target"]).backward()
    if ends == "with the model's error":
        model.encoders["audio"] = FailingModel()
    before = model_state(model, batches)
    if ends == "well":
        assert str(quag(model, batches)) == str(quag(model, batches))
    elif ends == "with a user's error":
        with pytest.raises(ShapeError):
            quag(model, [*batches, {}])
    else:
        with pytest.raises(RuntimeError, match="broken"):
            quag(model, batches)
    assert model_state(model, batches) == before
