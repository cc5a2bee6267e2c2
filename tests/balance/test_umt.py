"""UMT against its equations: the distance to teachers, unchanged parts, copies, missing modalities, a whole run."""

import copy
import pickle

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.balance.umt import distillation
from equipoise.errors import ConfigError, ShapeError
from equipoise.training.run import execute_run
from helpers.fusion import NAMES, batch, split_batch
from helpers.runs import run_spec
from helpers.steps import attention_model, step
from helpers.tolerance import TOL
from helpers.umt import build_teachers
from oracles.balance_c import distillation as slow

EXACT = TOL[torch.float64]


def build(names=("audio", "image"), *, seed=0, dtype=torch.float64, strength=10.0, **options):
    model = attention_model(names, seed=seed, dtype=dtype, unimodal="none", **options)
    balancer = eq.balance.UMT(model, teachers=build_teachers(names, dtype=dtype), strength=strength)
    return model, balancer, eq.BalancerList(model, [balancer])


def expected_distances(model, balancer, inputs):
    """name -> mean squared difference, by a loop over samples that have the modality."""
    result = {}
    for name in model.names:
        here = inputs.get("mask", {}).get(name, torch.ones(len(inputs["target"]), dtype=torch.bool)).tolist()
        with torch.no_grad():
            features = [
                part(inputs[name]).mean(dim=1).tolist() for part in (model.encoders[name], balancer.teachers[name])
            ]
        result[name] = slow(*([row for row, yes in zip(rows, here, strict=True) if yes] for rows in features))
    return result


def test_hand_computed_distance():
    ones, here = torch.ones(3, 2, dtype=torch.float64), torch.tensor([True, True, False])
    student = torch.tensor([[1.0, 2.0], [1.0, 5.0], [9.0, 9.0]], dtype=torch.float64)
    # (0 + 1 + 0 + 16) / 4
    assert float(distillation(student, ones, here)) == 4.25
    assert float(distillation(student, ones, torch.zeros(3, dtype=torch.bool))) == 0.0


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_loss_equals_the_oracle(number, missing):
    names = NAMES[:number]
    model, balancer, balancing = build(names)
    inputs = batch(names, size=7, missing=missing)
    output = model.train()(inputs)
    expected = model.loss(output.logits, inputs["target"]) + 10 * sum(
        expected_distances(model, balancer, inputs).values()
    )
    torch.testing.assert_close(balancing.loss(output, inputs["target"]), expected, **EXACT)


def test_distance_trains_students_only():
    model, balancer, balancing = build()
    plain = step(model, eq.BalancerList(model), batch())
    before = copy.deepcopy(balancer.state_dict())
    result = step(model, balancing, batch())
    changed = {name for name in result if not torch.equal(result[name], plain[name])}
    assert changed == {name for name in result if name.startswith("encoders")}
    assert all(parameter.grad is None for parameter in balancer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in balancer.state_dict().items())


def test_training_brings_students_closer():
    model, balancer, balancing = build()
    optimizer, inputs = torch.optim.SGD(model.parameters(), lr=0.05), batch()
    before = expected_distances(model, balancer, inputs)
    for _ in range(5):
        step(model, balancing, inputs)
        optimizer.step()
    after = expected_distances(model, balancer, inputs)
    assert all(after[name] < 0.9 * before[name] for name in before)


def test_teachers_are_copies_in_evaluation_mode():
    given = build_teachers()
    model = attention_model()
    balancer = eq.balance.UMT(model, teachers=given)
    nn.ModuleList([balancer]).train()
    assert not any(part.training for part in balancer.modules())
    assert given["audio"].training
    assert given["audio"][0].weight.requires_grad
    assert balancer.teachers["audio"] is not given["audio"]


def test_evaluation_runs_no_teacher():
    model, balancer, _ = build()
    asked = []
    for teacher in balancer.teachers.values():
        teacher.register_forward_hook(lambda *_: asked.append(1))
    model.eval()(batch())
    with torch.no_grad():
        model.train()(batch())
    assert not asked
    output = model(batch())
    balancer.penalty(output, batch()["target"])
    assert len(asked) == 2


def test_detach_removes_hooks():
    model, balancer, _ = build()
    assert all(encoder._forward_hooks for encoder in model.encoders.values())
    balancer.detach()
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_have_separate_teachers(twin):
    model, balancer, _ = build()
    inputs = batch()
    model.train()(inputs)
    other, copied = twin((model, balancer))
    expected = balancer.penalty(model(inputs), inputs["target"])
    balancer.teachers["audio"][0].weight.data.zero_()
    torch.testing.assert_close(copied.penalty(other(inputs), inputs["target"]), expected, **EXACT)


def test_accumulated_batches_equal_one_large_batch():
    full = batch(size=12)
    model, _, balancing = build()
    large, small = step(model, balancing, full), step(model, balancing, *split_batch(full, 5, 3, 4))
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, **EXACT)


def test_missing_modality_and_forward_pass_without_loss():
    model, _, balancing = build(NAMES[:3])
    inputs = {**batch(NAMES[:3], seed=1), "text": None}
    # Its features of text must not be taken for those of the next batch.
    model.train()(batch(NAMES[:3], size=7))
    result = step(model, balancing, inputs)
    assert "encoders.text.weight" not in result
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())


def test_autocast():
    model, balancer, _ = build(dtype=torch.float32)
    inputs = batch(dtype=torch.float32)
    exact = balancer.penalty(model(inputs), inputs["target"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = balancer.penalty(model(inputs), inputs["target"])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, **TOL[torch.bfloat16])


def test_teachers_are_saved():
    model, balancer, _ = build()
    other = eq.balance.UMT(model, teachers=build_teachers())
    other.teachers["audio"][0].weight.data.zero_()
    other.load_state_dict(balancer.state_dict())
    assert torch.equal(other.teachers["audio"][0].weight, balancer.teachers["audio"][0].weight)


def test_errors():
    with pytest.raises(ConfigError, match="UMT: expected two or more modalities, got audio"):
        eq.balance.UMT(attention_model(("audio",)))
    with pytest.raises(ConfigError, match=r"UMT: expected strength >= 0 .* got strength = -1"):
        eq.balance.UMT(attention_model(), strength=-1)
    with pytest.raises(ConfigError, match=r"UMT: expected .* teachers for audio, image, got .* teachers for text"):
        eq.balance.UMT(attention_model(), teachers=build_teachers(("text",)))
    model = attention_model()
    balancer = eq.balance.UMT(model, teachers=build_teachers(("audio",)))
    with pytest.raises(ConfigError, match="UMT: expected a teacher for 'image', got teachers for audio"):
        balancer.penalty(model(batch()), batch()["target"])
    model = attention_model()
    balancing = eq.BalancerList(model, [eq.balance.UMT(model, teachers=build_teachers(dim=7))])
    with pytest.raises(
        ShapeError, match=r"UMT 'audio': expected a teacher of the student's width dim = 12, got width 7"
    ):
        balancing.loss(model(batch()), batch()["target"])


def test_run_trains_teachers_first(tmp_path):
    run = execute_run(run_spec("concat+umt", epochs=1, batch_size=500), tmp_path)
    assert run["method"] == "concat+umt"
    assert sorted(path.name for path in (tmp_path / "teachers").iterdir()) == ["audio", "image"]
    assert eq.load(tmp_path).names == ("audio", "image")
