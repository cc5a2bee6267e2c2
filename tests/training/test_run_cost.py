"""The predicted cost of a run, against a run and against counts by hand."""

import json
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from equipoise.cli import run
from equipoise.diagnostics.flop_count import FlopCount
from equipoise.errors import ConfigError
from equipoise.training import predict_cost
from equipoise.training.run import execute_run
from helpers.runs import RandomData, run_spec

CPU = {"accelerator": "cpu"}
ENCODER = {"name": "SequenceEncoder", "dim": 8, "depth": 1, "heads": 2}


def job_of(method, **train):
    spec = run_spec(method, batch_size=16, epochs=1, **train)
    return replace(spec, recipe=replace(spec.recipe, encoders={"audio": ENCODER, "image": ENCODER}))


class CountedTraining(pl.Callback):
    """Counts the FLOPs of all training batches."""

    def __init__(self):
        self.flops = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._count = FlopCount().__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._count.__exit__(None, None, None)
        self.flops += self._count.flops


@pytest.mark.parametrize(
    ("method", "options"), [("joint", {"accumulate": 2}), ("concat+mmpareto", {}), ("concat+mla", {})]
)
def test_flops_are_those_of_the_run(method, options, tmp_path):
    source, job = RandomData(sizes=(61, 17, 300)), job_of(method, **options)
    counted = CountedTraining()
    trained = execute_run(job, tmp_path, trainer_options={**CPU, "callbacks": [counted]}, dataset=source)
    cost = predict_cost(job, steps=2, trainer_options=CPU, dataset=source)
    # What does not depend on the batch size, such as the products of gradients in MMPareto, is scaled as well.
    assert cost.flops == pytest.approx(counted.flops, rel=0.03)
    assert cost.parameters == trained["metrics"]["parameters"]
    steps = {"joint": 2, "concat+mmpareto": 4, "concat+mla": 4 * 2}
    assert cost.steps == steps[method]
    assert cost.process_bytes > 0
    assert min(cost.training_seconds, cost.validation_seconds, cost.evaluation_seconds) > 0
    assert cost.seconds == cost.training_seconds + cost.validation_seconds + cost.evaluation_seconds


def test_training_leaves_no_trace_and_no_random_effect(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, job = RandomData(), job_of("joint")
    first, second = (predict_cost(job, steps=3, trainer_options=CPU, dataset=source) for _ in range(2))
    assert first.flops == second.flops
    assert list(tmp_path.iterdir()) == []


def test_teachers_are_included():
    source, job = RandomData(), job_of("concat+umt")
    cost = predict_cost(job, steps=1, trainer_options=CPU, dataset=source)
    assert [teacher.method for teacher in cost.teachers] == ["audio", "image"]
    own = cost.flops_per_step * cost.samples / cost.batch_size
    assert cost.flops == pytest.approx(own + sum(teacher.flops for teacher in cost.teachers))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_count_of_forward_and_backward_is_that_of_torch(dropout):
    layer = nn.TransformerEncoderLayer(10, 2, 13, dropout=dropout, batch_first=True)
    x = torch.randn(3, 7, 10)
    with FlopCounterMode(display=False) as expected, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        layer(x).sum().backward()
    with FlopCount() as count, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        layer(x).sum().backward()
    assert count.flops == expected.get_total_flops()


def test_count_of_a_fused_backward_pass():
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    with FlopCount() as forward:
        output = nn.functional.scaled_dot_product_attention(query, key, value)
    with FlopCount() as backward:
        output.sum().backward()
    # The scores again, and the gradients of both factors of both products.
    assert (forward.flops, backward.flops) == (2 * 2 * 6 * 5 * 7 * 8, 5 * 2 * 6 * 5 * 7 * 8)


def test_command(tmp_path, capsys):
    arguments = ["bench", "--config", "generated", "--method", "joint", "--accelerator", "cpu"]
    assert run([*arguments, "--steps", "1", "--out", f"{tmp_path}/cost.json"]) == 0
    said, written = capsys.readouterr().out, json.loads((tmp_path / "cost.json").read_text())
    assert f"{written['parameters']:,}" in said
    assert "time of 1 steps" in said
    assert run([*arguments, "--steps", "0"]) == 1
    assert "expected steps >= 1, got 0" in capsys.readouterr().err


def test_unknown_method():
    with pytest.raises(ConfigError, match="joint"):
        predict_cost(run_spec("jont"))
