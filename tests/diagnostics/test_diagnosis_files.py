"""diagnosis.json and results.json: whole, the same when they come back, and refused where they are damaged."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from equipoise.diagnostics.suite import TESTS, Diagnosis, diagnose, results
from equipoise.errors import DataError, SchemaError
from equipoise.results import result_rows
from helpers.fusion import batch, joint_model


def random_batches():
    return [batch(size=size, seed=seed, dtype=torch.float32) for seed, size in enumerate((13, 7))]


@pytest.fixture(scope="module")
def diagnosis():
    return diagnose(
        joint_model(depth=2, dtype=torch.float32), random_batches(), modality="image", outside=random_batches()
    )


def test_save_and_load(diagnosis, tmp_path):
    path = diagnosis.save(tmp_path / "new")
    assert path == tmp_path / "new" / "diagnosis.json"
    for index in (path, path.parent):
        again = Diagnosis.load(index)
        assert again.to_dict() == diagnosis.to_dict()
        assert again.verdicts == diagnosis.verdicts
        assert (again.names, again.metrics) == (diagnosis.names, diagnosis.metrics)
    content = result_rows.load_results(tmp_path / "new")
    (run,) = content["runs"]
    assert run["metrics"] == json.loads(json.dumps(diagnosis.metrics))
    assert run["noise_modality"] == content["protocol"]["noise_modality"] == "image"
    assert set(run["keys"]["after"]) == set(run["shares"]) == {"clean", "noise"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"diagnosis.json", "results.json"}


def test_non_finite_values_round_trip(tmp_path):
    model = joint_model(dtype=torch.float32)
    with torch.no_grad():
        model.fusion.attention.query.weight.zero_()
        model.fusion.attention.query.bias.zero_()
    result = diagnose(model, random_batches())
    assert math.isnan(result.metrics["noise_attention_r"])
    result.save(tmp_path)
    assert "NaN" not in (tmp_path / "diagnosis.json").read_text()
    assert math.isnan(Diagnosis.load(tmp_path).metrics["noise_attention_r"])


def test_several_diagnoses_in_one_file(diagnosis, tmp_path):
    other = diagnose(joint_model(dtype=torch.float32), random_batches(), tests=["noise"], name="other")
    content = results([diagnosis, other])
    result_rows.write_results(tmp_path / "results.json", content)
    assert [run["method"] for run in result_rows.load_results(tmp_path)["runs"]] == ["joint", "other"]
    row = next(r for r in content["summary"] if (r["method"], r["metric"]) == ("other", "accuracy"))
    assert row["difference"] == pytest.approx(other.metrics["accuracy"] - diagnosis.metrics["accuracy"])


DAMAGE = {
    "truncated": (lambda text: text[: len(text) // 2], "expected JSON, got a truncated file"),
    "another kind": (
        lambda text: '{"schema": 1, "runs": []}',
        "a diagnosis of schema 1, got None of schema 1",
    ),
    "a list": (lambda text: "[]", "expected a diagnosis of schema 1, got 'list' of schema None"),
    "another schema": (lambda text: text.replace('"schema": 1', '"schema": 2'), "got 'diagnosis' of schema 2"),
    "no metrics": (lambda text: text.replace('"metrics"', '"matrics"'), "got no such metrics"),
    "words for figures": (lambda text: text.replace('"parameters": ', '"parameters": "x", "_": '), "no such metrics"),
    "a strange verdict": (lambda text: text.replace('"ok": "', '"ok": "very '), "got no such verdicts"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(what, diagnosis, tmp_path):
    change, message = DAMAGE[what]
    path = diagnosis.save(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(SchemaError, match=rf"Diagnosis\.load 'diagnosis\.json': .*{message}.*Run equipoise diagnose"):
        Diagnosis.load(tmp_path)


def test_missing_file_raises(tmp_path):
    with pytest.raises(DataError, match=r"expected a diagnosis, got no such file\. equipoise diagnose writes one"):
        Diagnosis.load(tmp_path)


PAGE = Path(__file__).parents[2] / "docs" / "diagnose.md"
PLACES = {"quag": "operator", "consistency": "site", "pair_error": "site", "cycle_error": "site"}


def test_documentation_lists_every_metric_and_verdict(diagnosis):
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+(?:/<\w+>)?)`", text))
    for metric in diagnosis.metrics:
        kind, slash, _ = metric.partition("/")
        assert f"{kind}/<{PLACES.get(kind, 'm')}>" in named if slash else kind in named, metric
    for verdict in diagnosis.verdicts:
        assert re.sub(r"/.*", "/<m>", verdict.key) in named
    assert all(re.search(rf"\| {test} \|", text) for test in TESTS)


def test_documentation_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    exec(code.replace("eq.diagnose", "diagnose"), {
        "model": joint_model(dtype=torch.float32), "test_loader": random_batches(), "diagnose": diagnose,
    })  # fmt: skip
    assert capsys.readouterr().out.startswith("joint ")
    assert {path.name for path in tmp_path.iterdir()} == {"diagnosis", "report.html"}
