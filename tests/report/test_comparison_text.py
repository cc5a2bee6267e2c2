"""Sentences of the comparison report follow from the numbers and state their significance."""

import pytest

from equipoise.report import comparison_text
from equipoise.report.effect_sizes import between, effect
from equipoise.report.results_view import ResultsView
from equipoise.results import result_rows
from equipoise.results.significance import pack_resamples, pack_text
from helpers.fake_results import fake_results, fake_run, fake_run_with_r, results_view


def text_of_results(base, balanced, metric="noise_attention_r", **extra):
    """Verdict on a base and a balanced fusion with these figures, one for each seed."""
    runs = [fake_run("joint", s, **{metric: b, **extra}) for s, b in enumerate(base)]
    runs += [fake_run("joint+x", s, **{metric: b, **extra}) for s, b in enumerate(balanced)]
    readings = results_view(runs, noise_modality="audio")
    return comparison_text.headline(readings), " ".join(comparison_text.verdict(readings))


def test_verdict_for_an_increase():
    head, text = text_of_results([-0.2, -0.22, -0.18], [0.5, 0.6, 0.55])
    assert head == "joint+x has a higher attention–noise correlation than joint (+0.75)"
    noise = "replacing audio by noise moves attention"
    assert f"In joint, {noise} toward it (r = −0.20 ± 0.02, 3 seeds)" in text
    assert f"In joint+x, {noise} away from it (r = 0.55 ± 0.05, 3 seeds)" in text
    # d = 0.70, 0.82, 0.73: t = 20.8 with two degrees of freedom, p = 1 - t / sqrt(2 + t^2) = 0.0023.
    effect = (
        "attention–noise correlation r is significantly higher, "
        "0.55 instead of −0.20 (+0.75, higher on 3 of 3 seeds, p = 0.002)"
    )
    assert text.startswith(f"The largest significant effect is that of joint+x compared with joint: {effect}.")
    assert text.count(effect) == 1


def test_verdict_when_sign_depends_on_noise_level():
    text = text_of_results([-0.4], [-0.3], noise_attention_r_own=0.05)[1]
    own = "With noise of the mean and standard deviation of each sample, r = 0.05."
    assert (
        f"{own} The signs differ: attention responds to the level of the noise rather than to the loss of content"
        in text
    )
    text = text_of_results([-0.4], [-0.3], noise_attention_r_own=-0.05)[1]
    assert "of each sample, r = \N{MINUS SIGN}0.05." in text
    assert "The signs differ" not in text


def test_verdict_for_a_decrease():
    head, text = text_of_results([0.5, 0.6, 0.55], [-0.2, -0.22, -0.18])
    assert head == "joint+x has a lower attention–noise correlation than joint (−0.75)"
    assert "r is significantly lower, −0.20 instead of 0.55 (−0.75, lower on 3 of 3 seeds" in text


def test_verdict_for_weak_evidence():
    head, text = text_of_results([0.1, 0.3, 0.2], [0.3, 0.1, 0.45])
    assert head == "No significant difference between joint and joint+x"
    assert "r does not differ significantly, 0.28 instead of 0.20 (+0.08, higher on 2 of 3 seeds, p = 0." in text
    assert "significantly higher" not in text
    assert "largest" not in text


def test_verdict_for_one_seed():
    head, text = text_of_results([-0.2], [0.6])
    assert head == "Comparison of joint and joint+x without a statistical test"
    assert text.startswith("Every method was run on one seed only, so no difference can be tested.")
    assert "r is 0.60 instead of −0.20 (+0.80, one seed only)" in text
    assert "significantly higher" not in text


def run_with_outcomes(method, right, seed=0, fold=None):
    """A run with the outcome of each test sample."""
    run = fake_run(method, seed, fold, accuracy=right.count("1") / len(right.replace("-", "")))
    return run | {"outcomes": {"accuracy": right}}


FEW, MANY = "1" * 60 + "0" * 40, "1" * 75 + "0" * 25


def test_one_seed_is_tested_over_samples():
    readings = results_view([run_with_outcomes("concat", FEW), run_with_outcomes("joint", MANY)])
    result = effect(readings, "joint", "accuracy")
    # Mid-p of McNemar's test: 15 samples that only one answers rightly, all of them the same one.
    assert result.p == pytest.approx(2 * 0.5**15 - 0.5**15)
    assert between(readings, "joint", "concat", "accuracy").p == result.p
    assert result.proof == "+15.0 points, one seed only, p < 0.001 over the test samples"
    assert comparison_text.headline(readings) == "joint has a higher accuracy than concat (+15.0 points, one seed only)"
    text = " ".join(comparison_text.verdict(readings))
    assert text.startswith("Every method was run on one seed only, so scores are compared over the test samples")
    assert f"accuracy is significantly higher, 75.0 % instead of 60.0 % ({result.proof})" in text
    assert "the difference to the second best, concat, is significant" in text


def test_one_seed_is_tested_over_groups_of_samples():
    # The 15 samples that only one answers rightly belong to one of four groups.
    groups = {"groups": pack_text([0] * 60 + [1] * 20 + [2] * 10 + [3] * 10)}
    runs = [run_with_outcomes("concat", FEW) | groups, run_with_outcomes("joint", MANY) | groups]
    result = effect(results_view(runs), "joint", "accuracy")
    assert result.p > 0.2
    assert result.proof == f"+15.0 points, one seed only, p = {result.p:.2f} over 4 groups of test samples"
    one_group = [run | {"groups": pack_text([0] * 100)} for run in runs]
    assert effect(results_view(one_group), "joint", "accuracy").p is None
    earlier = [run_with_outcomes("concat", FEW), runs[1]]
    assert effect(results_view(earlier), "joint", "accuracy").proof == result.proof
    other_groups = [runs[0], runs[1] | {"groups": pack_text([0] * 50 + [1] * 50)}]
    assert effect(results_view(other_groups), "joint", "accuracy").proof.endswith("over the test samples")


def test_resamples_of_samples_do_not_test_data_with_groups():
    runs = [
        fake_run(method, 0, None, accuracy=0.5, f1=value) | {"resamples": {"f1": pack_resamples([value] * 20)}}
        for method, value in (("concat", 0.5), ("joint", 0.7))
    ]
    assert effect(results_view(runs), "joint", "f1").p < 0.05
    grouped = [run | {"groups": pack_text([0, 0, 1, 1])} for run in runs]
    assert effect(results_view(grouped), "joint", "f1").proof == "+0.20, one seed only"


def test_one_seed_without_a_significant_difference():
    readings = results_view([run_with_outcomes("concat", FEW), run_with_outcomes("joint", FEW[3:] + "101")])
    assert effect(readings, "joint", "accuracy").p > 0.05
    assert comparison_text.headline(readings) == "No significant difference between concat and joint"
    assert "accuracy does not differ significantly, 59.0 % instead of 60.0 %" in " ".join(
        comparison_text.verdict(readings)
    )


@pytest.mark.parametrize("outcomes", [None, {}, {"accuracy": MANY[1:]}, {"accuracy": "-" * 100}])
def test_one_seed_with_outcomes_of_different_samples(outcomes):
    other = {**run_with_outcomes("joint", MANY), "outcomes": outcomes}
    if outcomes is None:
        del other["outcomes"]
    readings = results_view([run_with_outcomes("concat", FEW), other])
    assert effect(readings, "joint", "accuracy").p is None
    assert comparison_text.headline(readings) == "Comparison of concat and joint without a statistical test"
    assert "no difference can be tested" in comparison_text.verdict(readings)[0]


def test_several_seeds_are_tested_over_seeds():
    seeds = [run_with_outcomes(m, right, seed) for seed in (0, 1) for m, right in (("concat", FEW), ("joint", MANY))]
    assert effect(results_view(seeds), "joint", "accuracy").p is None
    seeds[-1] = run_with_outcomes("joint", MANY[2:] + "00", 1)
    result = effect(results_view(seeds), "joint", "accuracy")
    assert result.p == pytest.approx(result_rows.paired([0.15, 0.13])["p"])
    assert "samples" not in result.proof


def test_equal_differences_are_never_significant():
    head, text = text_of_results([0.0, 0.25, 0.5], [0.25, 0.5, 0.75])
    assert head == "Comparison of joint and joint+x without a statistical test"
    assert "r does not differ significantly, 0.50 instead of 0.25 (+0.25, higher on 3 of 3 seeds)" in text


def test_attention_without_consistent_response():
    _, text = text_of_results([-0.3, -0.31, -0.32], [-0.01, 0.01, 0.02])
    assert "In joint+x, replacing audio by noise has no significant effect on attention (r = 0.01" in text


def compared_runs(figures_of, metric="accuracy", **protocol):
    runs = [fake_run(m, s, **{metric: a}) for m, values in figures_of.items() for s, a in enumerate(values)]
    return results_view(runs, modalities=["audio", "image"], **protocol)


def test_headline_has_the_largest_significant_effect():
    accuracy = {"concat": (0.6, 0.61, 0.62), "joint": (0.7, 0.72, 0.73), "joint+rollingq": (0.71, 0.74, 0.74)}
    readings = compared_runs(accuracy)
    assert comparison_text.headline(readings) == "joint has a higher accuracy than concat (+10.7 points)"
    # A larger difference that is not significant stays behind.
    noisy = compared_runs({**accuracy, "sum": (0.2, 0.9, 0.3)})
    assert comparison_text.headline(noisy) == "joint has a higher accuracy than concat (+10.7 points)"
    # A modality alone is a baseline, and counts where nothing else was compared.
    single = compared_runs({"image": (0.2, 0.21, 0.23), "concat": (0.6, 0.62, 0.61), "joint": (0.61, 0.6, 0.62)})
    assert comparison_text.headline(single) == "No significant difference between concat and joint"


def test_error_metrics_are_lower_is_better():
    errors = {"concat": (-0.6, -0.61, -0.62), "joint": (-0.5, -0.52, -0.5), "image": (-0.7, -0.73, -0.71)}
    readings = compared_runs(errors, "negative_error")
    assert comparison_text.headline(readings) == "joint has a lower mean absolute error than concat (−0.10)"
    text = " ".join(comparison_text.verdict(readings))
    assert (
        "mean absolute error is significantly lower, 0.507 instead of 0.610 (−0.10, lower on 3 of 3 seeds, p = 0."
        in text
    )
    assert "joint has the lowest mean absolute error: 0.507 ± 0.012, 3 seeds" in text
    assert "The best unimodal baseline is image with 0.713 ± 0.015" in text
    assert "significantly better: concat (−0.10, lower on 3 of 3 seeds" in text
    assert comparison_text.scores_text(readings, "negative_error").startswith(
        "Mean absolute error: joint 0.507, concat 0.610"
    )
    assert "−0.5" not in text


def test_values_and_tests_are_consistent_across_sentences():
    """Headline, sentences, table and captions take each difference from the same value."""
    readings = compared_runs({"concat": (0.6, 0.61, 0.62), "joint": (0.6, 0.63, 0.61), "joint+x": (0.7, 0.71, 0.74)})
    for method in ("joint", "joint+x"):
        result = effect(readings, method, "accuracy")
        row = readings.row(method, "accuracy")
        assert result.sure == (row["p"] < 0.05)
        assert result.difference == pytest.approx(row["difference"])
        text = " ".join(comparison_text.verdict(readings))
        assert result.sentence in text
        assert result.proof in comparison_text.differences_text(readings, "accuracy")
        assert ("does not differ significantly" in result.sentence) != result.sure
        assert comparison_text.headline(readings).startswith(f"{method} ") == result.sure


def test_missing_reference_is_reported():
    runs = [fake_run("concat", 0, accuracy=0.5), fake_run("ensemble+x", 0, accuracy=0.6)]
    protocol = {"references": {"ensemble+x": "heads+x"}}
    content = result_rows.build_results(runs, protocol)
    assert {row["method"]: row["reference"] for row in content["summary"]} == {"concat": None, "ensemble+x": None}
    assert comparison_text.notices(content) == ["ensemble+x is not compared: its reference heads+x was not run."]
    both = result_rows.build_results([*runs, fake_run("heads+x", 0, accuracy=0.55)], protocol)
    assert {row["method"]: row["reference"] for row in both["summary"]}["ensemble+x"] == "heads+x"
    assert comparison_text.notices(both) == []
    # A comparison without a summary yet has the same references.
    assert ResultsView({**both, "summary": []}).row("ensemble+x", "accuracy")["reference"] == "heads+x"


def test_verdict_compares_fusions_with_the_best_single_modality():
    figures_of = {"audio": (0.4, 0.41), "image": (0.65, 0.66), "concat": (0.75, 0.762), "joint": (0.6, 0.611)}
    text = " ".join(comparison_text.verdict(compared_runs(figures_of)))
    assert (
        "concat has the highest mean accuracy: 75.6 ± 0.8 %, 2 seeds; the difference to the second best, image, is"
        in text
    )
    assert (
        "The best unimodal baseline is image with 65.5 ± 0.7 %, 2 seeds. Compared with it, significantly worse: joint"
        in text
    )
    assert "significantly better: concat (+10.1 points, higher on 2 of 2 seeds, p = 0.0" in text


def test_verdict_without_results():
    assert comparison_text.verdict(results_view([])) == ["No run has finished yet."]
    assert comparison_text.headline(results_view([])) == "No run yet"
    assert comparison_text.verdict(results_view([fake_run("m", 0), fake_run("m", 1)])) == [
        "No metric is defined for any run."
    ]
    assert comparison_text.headline(results_view([fake_run("m", 0)])) == "Results of m"


def test_sentences_state_the_direction_of_attention():
    readings = ResultsView(fake_results())
    assert "with audio replaced by noise; noise moves attention toward it" in comparison_text.noise_text(
        readings, "joint"
    )
    assert "noise moves attention away from it" in comparison_text.noise_text(readings, "joint+rollingq")
    assert "rotation of the query after epoch 3 (in 5 of 5 runs)" in comparison_text.share_text(
        readings, "joint+rollingq"
    )
    assert "rotated" not in comparison_text.share_text(readings, "joint")
    before = comparison_text.keys_text(readings, "joint+rollingq", "before")
    assert "just before the first rotation: the query is closest to the keys of audio" in before
    after = comparison_text.keys_text(readings, "joint+rollingq", "after")
    assert "at the end of training: the query is closest to the keys of image" in after
    assert comparison_text.rotations_text(readings).endswith("joint+rollingq 1.")


def test_sentences_name_the_corrupted_modality_of_each_method():
    runs = [fake_run_with_r("joint", s, "audio") for s in (0, 1)] + [
        fake_run_with_r("joint+x", s, "image") for s in (0, 1)
    ]
    readings = results_view(runs, noise_modality="the one attended most")
    assert (readings.noise_modality, readings.disturbed("joint"), readings.disturbed("joint+x")) == (
        None,
        "audio",
        "image",
    )
    text = " ".join(comparison_text.verdict(readings))
    assert "In joint, replacing audio by noise moves attention away from it" in text
    assert "In joint+x, replacing image by noise moves attention away from it" in text
    assert comparison_text.headline(readings) == "Comparison of joint and joint+x without a statistical test"
    with_accuracy = [run | {"metrics": run["metrics"] | {"accuracy": 0.5}} for run in runs]
    text = " ".join(comparison_text.verdict(results_view(with_accuracy)))
    assert "accuracy is the same, 50.0 %; r is not compared, since no pair of runs replaced the same modality" in text


def test_unfinished_and_failed_runs_are_reported():
    assert comparison_text.notices({"runs": []}) == []
    assert comparison_text.notices({"runs": [], "complete": True, "failures": []}) == []
    (message,) = comparison_text.notices({"runs": [], "complete": False, "failures": [
        {"method": "joint", "seed": 3, "fold": "A", "error": "loss is NaN", "kind": "NonFiniteError"}]})  # fmt: skip
    assert message == "joint, seed 3, fold A failed and is not included: loss is NaN"


def test_headline_is_corrected_for_the_number_of_tests():
    # d = 1.0, 1.2, 1.4 points of the first metric: t = 10.4, p = 0.009; the other tests are not significant.
    def runs_of(others):
        metrics = ["accuracy", *(f"accuracy_noise/m{number}" for number in range(others))]
        runs = [fake_run("a", seed, **dict.fromkeys(metrics, 0.5)) for seed in range(3)]
        for seed, (first, other) in enumerate([(0.510, 0.51), (0.512, 0.48), (0.514, 0.51)]):
            runs.append(fake_run("b", seed, **{**dict.fromkeys(metrics, other), "accuracy": first}))
        return runs

    def texts(others):
        runs = runs_of(others)
        protocol = {"methods": ["a", "b"], "references": {"b": "a"}}
        summary = result_rows.summarize_runs(runs, {"b": "a"})
        readings = ResultsView({"protocol": protocol, "runs": runs, "summary": summary})
        return comparison_text.headline(readings), comparison_text.verdict(readings)[0]

    assert texts(3)[0] == "b has a higher accuracy than a (+1.2 points)"
    assert texts(3)[1].startswith("The largest significant effect after Holm's correction for 4 tests is that of b")
    assert texts(9)[0] == "No significant difference between a and b"
    assert texts(9)[1] == "No difference to a reference is significant after Holm's correction for 10 tests."
