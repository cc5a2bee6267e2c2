"""sentences.py: what is said follows from the numbers, and says how sure they are."""

from equipoise.report import sentences
from equipoise.report.readings import Readings
from fake_results import attending, fake_results, one, read


def story(base, balanced, metric="noise_attention_r", **extra):
    """Verdict on a base and a balanced fusion with these figures, one for each seed."""
    runs = [one("joint", s, **{metric: b, **extra}) for s, b in enumerate(base)]
    runs += [one("joint+x", s, **{metric: b, **extra}) for s, b in enumerate(balanced)]
    readings = read(runs, noise_modality="audio")
    return sentences.headline(readings), " ".join(sentences.verdict(readings))


def test_verdict_on_a_cure():
    head, text = story([-0.2, -0.22, -0.18], [0.5, 0.6, 0.55])
    assert head == "joint+x looks at quality more than joint"
    noise = "with audio replaced by noise"
    assert f"joint does not look at quality: {noise}, attention moves towards it (r = −0.20 ± 0.02, 3 seeds)" in text
    assert f"joint+x looks at quality: {noise}, attention leaves it (r = 0.55 ± 0.05, 3 seeds)" in text
    # d = 0.70, 0.82, 0.73: t = 20.8 with two degrees of freedom, p = 1 - t / sqrt(2 + t^2) = 0.0023.
    assert "r rises from −0.20 to 0.55 (+0.75, on 3 of 3 seeds, p = 0.002)" in text


def test_verdict_on_harm():
    head, text = story([0.5, 0.6, 0.55], [-0.2, -0.22, -0.18])
    assert head == "joint+x looks at quality less than joint"
    assert "r falls from 0.55 to −0.20 (−0.75, on 3 of 3 seeds" in text


def test_verdict_on_weak_evidence():
    head, text = story([0.1, 0.3, 0.2], [0.3, 0.1, 0.45])
    assert head == "Whether joint+x looks at quality more than joint is open"
    assert "a change that chance alone could bring (+0.08, on 2 of 3 seeds, p = 0." in text
    assert "rises" not in text


def test_verdict_on_one_seed():
    head, text = story([-0.2], [0.6])
    assert head == "Whether joint+x looks at quality more than joint is open"
    assert text.startswith("Every method was run on one seed only, so any difference below may be luck.")
    assert "r goes from −0.20 to 0.60 (+0.80, one seed only)" in text
    assert "rises" not in text


def test_verdict_where_neither_looks():
    head, text = story([-0.3, -0.31, -0.32], [-0.01, 0.01, 0.02])
    assert head == "Neither joint+x nor joint looks at quality"
    assert "joint+x cannot be said to look at quality: replacing audio by noise has no steady effect" in text


def test_verdict_reads_the_golden_rule():
    figures_of = {"audio": (0.4, 0.41), "image": (0.65, 0.66), "concat": (0.75, 0.73), "joint": (0.6, 0.61)}
    runs = [one(m, s, accuracy=a) for m, values in figures_of.items() for s, a in enumerate(values)]
    text = " ".join(sentences.verdict(read(runs, modalities=["audio", "image"])))
    assert "concat has the highest mean accuracy: 74.0 ± 1.4 %, 2 seeds." in text
    assert "The best single modality is image with 65.5 ± 0.7 %, 2 seeds; below it: joint (60.5 %)." in text
    text = " ".join(sentences.verdict(read(runs[:6], modalities=["audio", "image"])))
    assert "no fusion is below it" in text


def test_verdict_with_nothing_to_say():
    assert sentences.verdict(read([])) == ["No run has finished yet, so there is nothing to say."]
    assert sentences.headline(read([])) == "No run yet"
    assert sentences.verdict(read([one("m", 0), one("m", 1)])) == [
        "No figure is defined for any run, so there is nothing to say."
    ]
    assert sentences.headline(read([one("m", 0)])) == "m alone"


def test_sentences_say_which_way_attention_went():
    readings = Readings(fake_results())
    assert "attention moves towards the destroyed audio" in sentences.noise_text(readings, "joint")
    assert "attention leaves the destroyed audio" in sentences.noise_text(readings, "joint+rollingq")
    assert "rotated after epoch 3 (in 5 of 5 runs)" in sentences.share_text(readings, "joint+rollingq")
    assert "rotated" not in sentences.share_text(readings, "joint")
    before = sentences.keys_text(readings, "joint+rollingq", "before")
    assert "just before the first rotation: the query stands closest to the keys of audio" in before
    after = sentences.keys_text(readings, "joint+rollingq", "after")
    assert "at the end of training: the query stands closest to the keys of image" in after
    assert sentences.rotations_text(readings).endswith("joint+rollingq 1.")


def test_each_method_is_told_by_the_modality_that_its_runs_destroyed():
    runs = [attending("joint", s, "audio") for s in (0, 1)] + [attending("joint+x", s, "image") for s in (0, 1)]
    readings = read(runs, noise_modality="the one attended most")
    assert (readings.noise_modality, readings.disturbed("joint"), readings.disturbed("joint+x")) == (
        None,
        "audio",
        "image",
    )
    text = " ".join(sentences.verdict(readings))
    assert "joint looks at quality: with audio replaced by noise" in text
    assert "joint+x looks at quality: with image replaced by noise" in text
    assert sentences.headline(readings) == "joint and joint+x compared"
    with_accuracy = [run | {"metrics": run["metrics"] | {"accuracy": 0.5}} for run in runs]
    compared = " ".join(sentences.verdict(read(with_accuracy)))
    assert "accuracy stays at 50.0 %; r is not compared, since no pair of runs destroyed the same modality" in compared


def test_unfinished_and_failed_runs_are_told():
    assert sentences.notices({"runs": []}) == []
    assert sentences.notices({"runs": [], "complete": True, "failures": []}) == []
    (said,) = sentences.notices({"runs": [], "complete": False, "failures": [
        {"method": "joint", "seed": 3, "fold": "A", "error": "loss is NaN", "kind": "NonFiniteError"}]})  # fmt: skip
    assert said == "joint, seed 3, fold A failed and is missing below: loss is NaN"
