"""Training runs: resumed runs are bit-exact, finished runs are reused, interrupts and invalid options raise."""

import warnings

import pytest
import torch

from equipoise.balance import RollingQ
from equipoise.errors import ConfigError
from equipoise.training import run as experiment
from equipoise.training.run import execute_run
from equipoise.training.run_spec import RunSpec, is_finished
from helpers.runs import (
    BALANCERS,
    Interruption,
    assert_same_weights,
    recipe,
    reproducible_metrics,
    run_interrupted,
    run_spec,
    weights,
)

CASES = {
    "joint": ("joint", {}, {}),
    "no dropout": ("still", {}, {}),
    "rollingq": ("joint+rollingq", {}, {}),
    "accumulation": ("joint+rollingq", {}, {"accumulate": 2, "batch_size": 130}),
    "clip, sgd, heads teach": ("concat", {}, {"optimizer": "sgd", "clip": 0.1, "unimodal": "train"}),
    "pass": ("joint+rollingq", {"rollingq": {"beta": 0.0, "statistics": "full_pass", "warmup_epochs": 1}}, {}),
    "progressive": ("deep+progressive", {}, {"epochs": 4}),
    "progressive, pass": (
        "deep+passing",
        {"passing": {**BALANCERS["progressive"], "statistics": "full_pass"}},
        {"epochs": 4},
    ),
}


# The other cases are parts of these.
FAST = ("accumulation", "clip, sgd, heads teach", "progressive, pass")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_resumed_run_is_bit_exact(case, tmp_path):
    method, balancers, train = CASES[case]
    this = run_spec(method, balancers=balancers, **train)
    straight = execute_run(this, tmp_path / "straight")
    # A progress report comes before its epoch's checkpoint: a crash at 1 loses all, one at 3 keeps two epochs.
    resumed = run_interrupted(this, tmp_path / "resumed", 1, 3)
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert reproducible_metrics(resumed) == reproducible_metrics(straight)
    assert [entry["epoch"] for entry in resumed["history"]] == list(range(1, this.recipe.train.epochs + 1))
    if "+" in method:
        assert resumed["history"][-1]["rotations"] >= 1
        assert set(resumed["keys"]) == {"before", "after"}


def test_skipped_rotation_warns_once_per_epoch(tmp_path):
    """The history callback checks whether a rotation is due and suppresses the warning that the balancer will give."""
    still = {"rollingq": {"beta": 0.0, "rho": 1.0, "warmup_epochs": 1}}
    real = RollingQ._step

    def one_modality(self, total, group):
        return None if int(self.epochs) else real(self, total, group)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        patch.setattr(RollingQ, "_step", one_modality)
        execute_run(run_spec("joint+rollingq", balancers=still, epochs=3), tmp_path)
    assert sum("skipped a rotation" in str(warning.message) for warning in messages) == 2


def test_resumed_run_does_not_restart(tmp_path):
    """Control for the equality above: the resumed run trains only the missing epochs."""
    with pytest.raises(Interruption):
        execute_run(run_spec(), tmp_path, progress=raise_at(3))
    seen = []
    execute_run(run_spec(), tmp_path, progress=lambda done, epochs: seen.append((done, epochs)))
    assert seen == [(3, 3)]


def test_weights_depend_on_seed_and_dropout(tmp_path):
    first, other = (
        execute_run(run_spec(epochs=1), tmp_path / "0"),
        execute_run(run_spec(epochs=1, seed=1), tmp_path / "1"),
    )
    assert reproducible_metrics(first)["metrics"] != reproducible_metrics(other)["metrics"]
    still = execute_run(run_spec("still", epochs=1), tmp_path / "still")
    assert still["history"][0]["loss"] != first["history"][0]["loss"]


def test_killed_between_the_last_epoch_and_the_evaluation(tmp_path):
    this = run_spec("joint+rollingq")
    full = execute_run(this, tmp_path)
    before = weights(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    seen = []
    again = execute_run(this, tmp_path, progress=lambda *state: seen.append(state))
    assert seen == []
    assert reproducible_metrics(again) == reproducible_metrics(full)
    assert again["keys"]["before"] == full["keys"]["before"]
    assert_same_weights(before, weights(tmp_path))


def test_finished_run_is_loaded(tmp_path):
    first = execute_run(run_spec(epochs=1), tmp_path)
    assert execute_run(run_spec(epochs=1), tmp_path, progress=raise_at(1)) == first
    assert is_finished(run_spec(epochs=1), tmp_path) == first
    assert is_finished(run_spec(epochs=2), tmp_path) is None
    (tmp_path / "run.json").write_text("{")
    assert is_finished(run_spec(epochs=1), tmp_path) is None


def test_checkpoint_of_another_recipe_is_not_used(tmp_path):
    execute_run(run_spec(epochs=1), tmp_path)
    seen = []
    changed = execute_run(run_spec(epochs=2), tmp_path, progress=lambda *state: seen.append(state))
    assert seen == [(1, 2), (2, 2)]
    assert len(changed["history"]) == 2


def test_fingerprint_does_not_depend_on_data_location():
    here, there = (RunSpec(recipe(), "joint", 0) for _ in range(2))
    there.recipe.data["root"] = "elsewhere"
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() != RunSpec(recipe(epochs=7), "joint", 0).fingerprint()
    assert here.fingerprint() != RunSpec(recipe(), "concat", 0).fingerprint()
    assert here.fingerprint() != RunSpec(recipe(), "joint", 1).fingerprint()
    # Spaces in a method's name do not hide the options of its parts.
    spaced = [
        RunSpec(recipe(balancers={"rollingq": options}), "joint + rollingq", 0) for options in ({}, {"beta": 0.5})
    ]
    assert spaced[0].fingerprint() != spaced[1].fingerprint()


def test_data_do_not_depend_on_thread_count():
    """A process with all cores and a worker with one see the same numbers, so that both reach the same results."""
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            experiment._load_dataset_cached.cache_clear()
            seen.append(experiment.load_run_dataset(recipe(), None).train.inputs)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


def test_ctrl_c_in_training_raises_keyboard_interrupt(tmp_path):
    """Lightning would end the process with status 1, and leave it deaf."""
    import signal

    before = signal.getsignal(signal.SIGINT)

    def press(done, epochs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute_run(run_spec(epochs=2), tmp_path, progress=press)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "dpp"}, "train: expected options that Lightning's Trainer takes, got .*'dpp'"),
        ({"accelerator": "abacus"}, "Trainer takes, got .*'abacus'"),
        ({"accelerator": "cpu", "devices": "two"}, "Trainer takes, got `devices` selected"),
    ],
)
def test_options_unsupported_by_lightning_raise(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        execute_run(run_spec(), tmp_path, trainer_options=options)


def raise_at(moment):
    def crash(done, epochs):
        if done == moment:
            raise Interruption

    return crash
