"""A whole diagnosis: metrics against loops and single tests, skipped tests, and restored model state."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import equipoise as eq
from equipoise.diagnostics import mask_modality, modality_shapley, noise_response, ood
from equipoise.diagnostics.noise_test import input_statistics
from equipoise.diagnostics.suite import TESTS, diagnose
from equipoise.errors import ConfigError, EquipoiseError, NonFiniteError, ShapeError
from helpers.fusion import DIM, FEATURES, OUTPUTS, batch, joint_model
from helpers.model_state import FailingModel, model_state
from helpers.tolerance import TOL

CLOSE = TOL[torch.float32]
NAMES = {1: ("audio",), 2: ("audio", "image"), 3: ("audio", "image", "text")}


def random_batches(names=NAMES[2], *, sizes=(13, 7), dtype=torch.float32, missing=()):
    return [batch(names, size=size, seed=seed, dtype=dtype, missing=missing) for seed, size in enumerate(sizes)]


def build_model(fusion, names=NAMES[2], *, task="classification", outputs=OUTPUTS, unimodal="probe", seed=0):
    torch.manual_seed(seed)
    encoders = {name: nn.Linear(FEATURES[name], DIM) for name in names}
    return eq.FusionModel(encoders, fusion, outputs, task=task, unimodal=unimodal)


def with_targets(loader, target):
    return [{**inputs, "target": target(len(inputs["target"]))} for inputs in loader]


@pytest.fixture(scope="module")
def deep_diagnosis():
    model, loader = joint_model(depth=2, dtype=torch.float32), random_batches()
    outside = [{name: 3 * values for name, values in inputs.items() if name != "target"} for inputs in random_batches()]
    return model, loader, outside, diagnose(model, loader, outside=outside, modality="image", seed=3)


def slow_accuracy(logits, target):
    right = [row.index(max(row)) == expected for row, expected in zip(logits, target, strict=True)]
    return sum(right) / len(right)


def test_scores_against_loops(deep_diagnosis):
    result, loader, _, actual = deep_diagnosis
    target = [int(right) for inputs in loader for right in inputs["target"]]
    result.eval()
    with torch.no_grad():
        clean = [row for inputs in loader for row in result(inputs).logits.tolist()]
        heads = {
            name: [row for inputs in loader for row in result(inputs).unimodal_logits[name].tolist()]
            for name in NAMES[2]
        }
        assert actual.metrics["accuracy"] == pytest.approx(slow_accuracy(clean, target))
        for name in NAMES[2]:
            assert actual.metrics[f"accuracy_alone/{name}"] == pytest.approx(slow_accuracy(heads[name], target))
            mean, std = input_statistics(loader, name, who="test")
            noisy = []
            for number, inputs in enumerate(loader):
                generator = torch.Generator().manual_seed(3 * 1_000_003 + number)
                drawn = torch.randn(inputs[name].shape, generator=generator) * std + mean
                noisy += result({**inputs, name: drawn}).logits.tolist()
            assert actual.metrics[f"accuracy_noise/{name}"] == pytest.approx(slow_accuracy(noisy, target))
            changed = [a.index(max(a)) != b.index(max(b)) for a, b in zip(clean, noisy, strict=True)]
            assert actual.metrics[f"changed_noise/{name}"] == pytest.approx(sum(changed) / len(changed))
            gone = [{**inputs, name: None} for inputs in loader]
            without = [row for inputs in gone for row in result(inputs).logits.tolist()]
            assert actual.metrics[f"accuracy_mask/{name}"] == pytest.approx(slow_accuracy(without, target))
    most = max(target.count(right) for right in target)
    assert actual.metrics["accuracy_constant"] == pytest.approx(most / len(target))


def test_scores_match_the_individual_diagnostics(deep_diagnosis):
    result, loader, outside, actual = deep_diagnosis
    statistics = {"image": input_statistics(loader, "image", who="test")}
    response = noise_response(result, loader, modality="image", noise=statistics, seed=3)
    own = noise_response(result, loader, modality="image", seed=3)
    assert actual.metrics["noise_attention_r_own"] == pytest.approx(own.r)
    assert actual.metrics["noise_attention_r"] == pytest.approx(response.r)
    assert actual.metrics["noise_attention_r_same"] == pytest.approx(response.r_same)
    assert actual.metrics["noise_attention_p"] == pytest.approx(response.p)
    assert actual.details["response"]["modality"] == "image"
    worth = modality_shapley(result, loader)
    assert {name: actual.metrics[f"shapley/{name}"] for name in NAMES[2]} == pytest.approx(worth)
    total = actual.metrics["accuracy"] - actual.metrics["accuracy_constant"]
    assert sum(worth.values()) == pytest.approx(total, abs=CLOSE["atol"])
    left = mask_modality(result, loader).without
    assert {name: actual.metrics[f"accuracy_mask/{name}"] for name in NAMES[2]} == pytest.approx(left)
    unknown = ood(result, loader, outside)
    assert (actual.metrics["auroc"], actual.metrics["fpr95"]) == pytest.approx((unknown.auroc, unknown.fpr95))
    full, thop = (eq.diagnostics.cost(result, loader[0], convention=kind) for kind in ("full", "thop"))
    assert [actual.metrics[name] for name in ("parameters", "flops", "parameters_thop", "flops_thop")] == [
        full.parameters, full.flops, thop.parameters, thop.flops,
    ]  # fmt: skip


def test_attention_matches_watch(deep_diagnosis):
    result, loader, _, actual = deep_diagnosis
    result.eval()
    with torch.no_grad(), eq.watch(result) as seen:
        for inputs in loader:
            result(inputs)
    rows = actual.details["attention"]["layers"]
    assert [row["site"] for row in rows] == seen.layers == ["fusion.blocks.0.attention", "fusion.blocks.1.attention"]
    for row in rows:
        torch.testing.assert_close(torch.tensor(row["share"]), seen.share(row["site"]).mean(dim=0), rtol=0, atol=1e-6)
        for share, special in zip(row["share"], row["special"], strict=True):
            assert sum(share) + special == pytest.approx(1, abs=1e-5)
    own = seen.by_query(rows[0]["site"])
    torch.testing.assert_close(torch.tensor(rows[0]["by_query"]), own.mean(dim=0), rtol=0, atol=1e-6)
    # In the last block a class token alone reads.
    assert rows[1]["by_query"] is None
    mean = own.mean(dim=(0, 1)).tolist()
    for index, name in enumerate(NAMES[2]):
        gap = 100 * abs(mean[index][index] - mean[index][1 - index]) / sum(mean[index])
        assert actual.metrics[f"attention_gap/{name}"] == pytest.approx(gap, rel=1e-4)


def test_block_residuals_against_loops(deep_diagnosis):
    result, loader, _, actual = deep_diagnosis
    result.eval()
    kept = {"input": [], "blocks.0": []}
    with torch.no_grad():
        for inputs in loader:
            packed = eq.pack(result.encode(inputs), cls=result.fusion.cls)
            kept["input"] += list(packed.values)
            kept["blocks.0"] += list(result.fusion.blocks[0](packed.values, share=False).output)
    rows = actual.details["collapse"]["layers"]
    # The last block passes on the class token alone, which would always be like itself.
    assert [row["layer"] for row in rows] == list(kept)
    for row in rows:
        parts = []
        for tokens in kept[row["layer"]]:
            mean = sum(tokens) / len(tokens)
            apart = sum(float((token - mean).square().sum()) for token in tokens)
            parts.append(math.sqrt(apart / sum(float(token.square().sum()) for token in tokens)))
        assert row["mean"] == pytest.approx(sum(parts) / len(parts), rel=1e-4)
    assert actual.metrics["residual_first"] == rows[0]["mean"]
    assert actual.metrics["residual_last"] == rows[-1]["mean"]


def test_all_applicable_tests_are_run(deep_diagnosis):
    result = deep_diagnosis[3]
    assert result.skipped == {}
    assert set(result.details) == set(TESTS)
    assert result.samples == 20
    assert all(isinstance(value, float | int) for value in result.metrics.values())
    assert (result.name, result.names, result.task) == ("joint", NAMES[2], "classification")
    assert str(result).splitlines()[0].startswith("joint ")
    assert len(str(result).splitlines()) == 1 + len(result.verdicts)


@pytest.mark.parametrize("count", NAMES)
@pytest.mark.parametrize("depth", [1, 2])
def test_any_number_of_modalities(count, depth):
    names = NAMES[count]
    result = diagnose(joint_model(names, depth=depth, dtype=torch.float32), random_batches(names))
    assert {f"accuracy_noise/{name}" for name in names} <= set(result.metrics)
    assert ("masking" in result.skipped) == ("response" in result.skipped) == (count == 1)
    assert ("collapse" in result.details) == (depth == 2)
    assert set(result.skipped) | set(result.details) == set(TESTS)
    if count == 1:
        assert result.skipped["masking"] == "the model has one modality: no modality remains without it"
    else:
        assert sum(result.metrics[f"air/{name}"] for name in names) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "fusion",
    [
        eq.fusion.Concat,
        eq.fusion.Sum,
        eq.fusion.FiLM,
        eq.fusion.Gated,
        eq.fusion.Unimodal,
        eq.fusion.MulT,
        eq.fusion.MBT,
        eq.fusion.JMT,
        eq.fusion.MMML,
        eq.fusion.MidFusion,
    ],
)
def test_every_fusion_and_reasons_for_skipped_tests(fusion):
    result = diagnose(build_model(fusion(DIM)), random_batches())
    assert set(result.skipped) | set(result.details) == set(TESTS)
    assert {"score", "noise", "masking", "shapley", "corruption", "gradients", "cost"} <= set(result.details)
    assert result.skipped["ood"] == "no out-of-distribution inputs were given; see outside"
    assert all(len(reason) > 20 for reason in result.skipped.values())
    if fusion is not eq.fusion.MidFusion:
        assert result.skipped["response"] == f"{fusion.__name__} has no attention over all modalities"


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_all_tasks(task):
    model = build_model(eq.fusion.JointAttention(DIM, dropout=0.0), task=task)
    random = torch.Generator().manual_seed(5)

    def target(size):
        drawn = torch.randn(size, OUTPUTS, generator=random)
        return (drawn > 0).float() if task == "multilabel" else drawn

    loader = with_targets(random_batches(), target)
    result = diagnose(model, loader, outside=loader)
    model.eval()
    with torch.no_grad():
        pairs = [(model(inputs).logits, inputs["target"]) for inputs in loader]
    if task == "multilabel":
        right = [float((a > 0) == bool(b)) for x, y in pairs for a, b in zip(x.flatten(), y.flatten(), strict=True)]
        assert result.metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    else:
        errors = [float((a - b).abs().mean()) for x, y in pairs for a, b in zip(x, y, strict=True)]
        mean = sum(errors) / len(errors)
        assert result.metrics["negative_error"] == pytest.approx(-mean)
        deviation = math.sqrt(sum((error - mean) ** 2 for error in errors) / len(errors))
        assert result.details["score"]["deviation"] == pytest.approx(deviation, rel=1e-5)
    assert result.skipped["ood"] == f"requires a classifier, and the task is {task}"
    assert set(result.skipped) == {"ood", "gap", "consistency", "collapse"}


def test_regression_of_one_number():
    model = build_model(eq.fusion.Concat(DIM), task="regression", outputs=1)
    result = diagnose(model, with_targets(random_batches(), torch.randn))
    assert result.metrics["negative_error"] < 0
    assert result.metrics["negative_error_constant"] < 0


def test_samples_with_missing_modality():
    model = joint_model(dtype=torch.float32)
    loader = random_batches(missing=NAMES[2])
    result = diagnose(model, loader)
    assert set(result.skipped) == {"ood", "gap", "consistency", "collapse"}
    has = torch.cat([inputs["mask"]["audio"] for inputs in loader])
    target = torch.cat([inputs["target"] for inputs in loader])[has].tolist()
    model.eval()
    with torch.no_grad():
        rows = torch.cat([model(inputs).unimodal_logits["audio"] for inputs in loader])[has].tolist()
    assert result.metrics["accuracy_alone/audio"] == pytest.approx(slow_accuracy(rows, target))


def test_missing_modality_of_a_batch_is_not_replaced():
    loader = [*random_batches(), {**batch(size=3, dtype=torch.float32), "image": None}]
    result = diagnose(joint_model(dtype=torch.float32), loader)
    for test in ("noise", "corruption", "response"):
        assert "'image': expected a floating tensor or word ids in every batch" in result.skipped[test]
    assert "accuracy_mask/image" in result.metrics


def test_attention_without_targets():
    loader = [{name: values for name, values in inputs.items() if name != "target"} for inputs in random_batches()]
    result = diagnose(joint_model(dtype=torch.float32), loader)
    assert result.skipped["score"] == result.skipped["masking"] == "the batches have no target"
    assert {"response", "attention", "keys", "cost"} == set(result.details)
    assert "share/audio" in result.metrics


class Foreign(nn.Module):
    """A model with names and Output only."""

    names = NAMES[2]

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES["audio"], OUTPUTS)

    def forward(self, batch):
        features = batch["audio"].mean(dim=1)
        return eq.Output(features=features, logits=self.head(features))


def test_foreign_model():
    result = Foreign()
    actual = diagnose(result, random_batches(), name="mine")
    assert actual.name == "mine"
    assert actual.skipped["score"].startswith("the model has no task (classification")
    result.task = "classification"
    actual = diagnose(result, random_batches())
    assert actual.metrics["changed_noise/image"] == 0.0
    assert actual.name == "foreign"
    assert actual.skipped["masking"] == "Foreign is not a FusionModel: it has no encoders, encode, fuse, loss"
    assert {verdict.key: verdict.claim for verdict in actual.verdicts}["use/image"] == "ignores image"


def test_selected_tests_and_progress():
    heard = []
    model, loader = joint_model(dtype=torch.float32), random_batches()
    result = diagnose(model, loader, tests=["masking", "cost"], progress=lambda *told: heard.append(told))
    assert set(result.details) == {"score", "masking", "cost"}
    assert heard == [("score", 0, 3), ("masking", 1, 3), ("cost", 2, 3), ("", 3, 3)]
    assert result.protocol["tests"] == ["score", "masking", "cost"]


def test_scores_of_unimodal_models_override_heads():
    model, alone = joint_model(dtype=torch.float32), {"audio": 0.25, "image": 0.75}
    result = diagnose(model, random_batches(), tests=[], alone=alone)
    assert {name: result.metrics[f"accuracy_alone/{name}"] for name in alone} == alone
    assert result.details["score"]["alone_from"] == "models"
    without = diagnose(build_model(eq.fusion.Concat(DIM), unimodal="none"), random_batches(), tests=[])
    assert not any("alone" in name for name in without.metrics)


def test_shuffled_loader_gives_the_same_result():
    model, rows = joint_model(dtype=torch.float32), batch(size=29, dtype=torch.float32)
    samples = [{name: values[i] for name, values in rows.items()} for i in range(29)]
    torch.manual_seed(7)
    shuffled = diagnose(model, DataLoader(samples, batch_size=29, shuffle=True))
    plain = diagnose(model, DataLoader(samples, batch_size=29), tests=["masking", "keys", "shapley"])
    for name, value in plain.metrics.items():
        assert shuffled.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    own = DataLoader(samples, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
    result = diagnose(model, own, tests=["noise"])
    assert "in the same order each time, got different targets. Disable shuffling" in result.skipped["noise"]


def test_results_are_deterministic():
    model, loader = joint_model(depth=2, dropout=0.5, dtype=torch.float32).train(), random_batches()
    first, second = diagnose(model, loader), diagnose(model, lambda: iter(loader))
    assert first.to_dict() == second.to_dict()
    assert diagnose(model, loader, seed=1).metrics != first.metrics


ERRORS = {
    "an unknown test": (
        {"tests": ["maskin"]}, ConfigError, r"diagnose: expected a known test, got 'maskin'\. Did you mean 'masking'",
    ),
    "a test that is no list": ({"tests": "noise"}, ConfigError, r"a list of tests, got 'noise'\. Pass \['noise'"),
    "an unknown modality": ({"modality": "imag"}, ConfigError, r"diagnose: expected a known modality, got 'imag'"),
    "noise of another": ({"noise": {"text": (0.0, 1.0)}}, ConfigError, r"diagnose noise: .* got 'text'"),
    "another alone": ({"alone": {"text": 0.5}}, ConfigError, r"diagnose alone: expected a known modality, got 'text'"),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_invalid_options_raise(what):
    options, kind, message = ERRORS[what]
    with pytest.raises(kind, match=message):
        diagnose(joint_model(dtype=torch.float32), random_batches(), **options)


def test_unsupported_models_raise():
    model, loader = joint_model(dtype=torch.float32), random_batches()
    with pytest.raises(ConfigError, match=r"iterated several times: .*, got a list_iterator\. Pass list\(loader\)"):
        diagnose(model, iter(loader))
    with pytest.raises(ConfigError, match="got a int"):
        diagnose(model, 3)
    with pytest.raises(ShapeError, match="expected at least one batch, got none"):
        diagnose(model, [])
    with pytest.raises(ConfigError, match="expected a FusionModel, or a module with the modalities' names"):
        diagnose(nn.Linear(2, 3), loader)
    loader[1]["audio"][4] = math.nan
    with pytest.raises(NonFiniteError, match=r"NaN for 1 of 20 samples, the first is number 17"):
        diagnose(model, loader)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("ends", ["well", "with a user's error", "with the model's error"])
def test_model_state_is_restored(depth, ends):
    model = joint_model(depth=depth, dropout=0.5, dtype=torch.float32).train()
    model.fusion.eval()
    model.head.weight.requires_grad_(False)
    loader = random_batches()
    model.loss(model(loader[0]).logits, loader[0]["target"]).backward()
    model.head.bias.grad = None
    if ends == "with the model's error":
        model.encoders["audio"] = FailingModel()
    before = model_state(model, loader)
    if ends == "well":
        diagnose(model, loader, outside=loader)
    elif ends == "with a user's error":
        with pytest.raises(EquipoiseError):
            diagnose(model, lambda: [*loader, {}])
    else:
        with pytest.raises(RuntimeError, match="broken"):
            diagnose(model, loader)
    assert model_state(model, loader) == before
