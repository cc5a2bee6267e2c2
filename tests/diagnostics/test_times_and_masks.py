"""Damage of a modality keeps the times and masks of a batch, also of a model that needs times."""

import pytest
import torch

import equipoise as eq
from equipoise.cli.diagnose_command import _Noise
from equipoise.data import load_dataset
from equipoise.data.corruptions import corrupt_batch, corruption_names, replace_samples
from equipoise.diagnostics.prediction_collection import NoiseSource, collect_predictions
from equipoise.encoders import SequenceEncoder

FRAMES = (7, 4, 7)


def timed_batch():
    """Audio of three samples with 7, 4 and 7 frames at different times, and a sensor without masks."""
    mask = torch.arange(7) < torch.tensor(FRAMES)[:, None]
    times = torch.arange(7.0) * torch.tensor([[0.1], [0.3], [0.2]]) + torch.tensor([[0.0], [1.0], [2.0]])
    generator = torch.Generator().manual_seed(0)
    return {
        "audio": torch.randn(3, 7, 5, generator=generator).masked_fill(~mask[..., None], 0),
        "sensor": torch.randn(3, 4, 2, generator=generator), "target": torch.tensor([0, 1, 1]), "mask": {"audio": mask},
        "times": {"audio": times.masked_fill(~mask, 0), "sensor": torch.arange(4.0).expand(3, 4)},
    }  # fmt: skip


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("name", corruption_names("sequence"))
def test_corruptions(name, severity):
    batch = timed_batch()
    before = {key: {n: t.clone() for n, t in batch[key].items()} for key in ("mask", "times")}
    damaged = corrupt_batch(batch, "audio", name, severity=severity, kind="sequence")
    for key, parts in before.items():
        assert all(torch.equal(batch[key][n], part) for n, part in parts.items())
    assert torch.equal(damaged["times"]["sensor"], before["times"]["sensor"])
    assert torch.equal(damaged["sensor"], batch["sensor"])
    mask, times = damaged["mask"]["audio"], damaged["times"]["audio"]
    if name == "swapped":
        # A swapped sample is that of its partner altogether.
        for row in range(3):
            partner = [torch.equal(damaged["audio"][row], one) for one in batch["audio"]].index(True)
            assert torch.equal(times[row], before["times"]["audio"][partner])
            assert torch.equal(mask[row], before["mask"]["audio"][partner])
        return
    assert torch.equal(times, before["times"]["audio"])
    if name == "missing":
        assert bool((~mask | before["mask"]["audio"]).all())
    else:
        assert torch.equal(mask, before["mask"]["audio"])


def test_samples_take_their_times_along():
    batch = timed_batch()
    damaged = corrupt_batch(batch, "audio", "swapped", kind="sequence")
    result = dict(batch)
    hit = torch.tensor([True, False, False])
    replace_samples(result, damaged, "audio", hit)
    for key in ("mask", "times"):
        assert torch.equal(result[key]["audio"][0], damaged[key]["audio"][0])
        assert torch.equal(result[key]["audio"][1:], batch[key]["audio"][1:])


class Recorder(torch.nn.Module):
    """A fusion model that notes the masks and times of its batches."""

    def __init__(self, model):
        super().__init__()
        self.model, self.names, self.seen = model, model.names, []

    def forward(self, batch):
        self.seen.append({key: dict(batch[key]) for key in ("mask", "times")})
        return self.model(batch)


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoders = {
        "audio": SequenceEncoder(5, dim=16, heads=2, positions="time"),
        "sensor": SequenceEncoder(2, dim=16, heads=2, positions="time"),
    }
    return eq.FusionModel(encoders, eq.fusion.JointAttention(dim=16), num_outputs=2).eval()


@pytest.mark.parametrize("distribution", ["dataset", "per_sample"])
def test_noise(model, distribution):
    batch, recorder = timed_batch(), Recorder(model)
    collect_predictions(recorder, [batch], noise=NoiseSource("audio", distribution=distribution))
    for key in ("mask", "times"):
        assert all(torch.equal(part, recorder.seen[0][key][name]) for name, part in batch[key].items())


def test_a_diagnosis_of_a_model_that_needs_times(model):
    tests = ["noise", "masking", "response", "shapley", "robustness"]
    diagnosis = eq.diagnose(model, [timed_batch(), timed_batch()], tests=tests)
    assert diagnosis.skipped == {}


def test_noise_of_all_modalities_has_times():
    """As ``equipoise diagnose`` draws out-of-distribution inputs."""
    data = load_dataset("two_rates", samples=20)
    noise = list(_Noise(data, data.names, seed=0))
    expected = data.batch("test", torch.arange(len(data.test)), seed=0, epoch=0, train=False)
    for key in ("mask", "times"):
        for name in data.names:
            assert torch.equal(torch.cat([batch[key][name] for batch in noise]), expected[key][name])
    assert not torch.equal(noise[0]["audio"], expected["audio"])
