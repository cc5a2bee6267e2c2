"""Random shift, gain, spectral tilt and noise."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.augmentation import add_noise, augment_spectrogram, random_shift, spectral_tilt
from equipoise.data.counter_rng import CounterRNG
from helpers.tolerance import TOL
from oracles import data as oracles_data


def counter_rng(batch, seed=0):
    return CounterRNG(seed, 0, torch.arange(batch), "train")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=5))
def test_random_shift_equals_loop(frames):
    spectrogram = torch.randn(len(frames), 7, 3, generator=torch.Generator().manual_seed(0))
    fill = torch.tensor([5.0, 6.0, 7.0])
    expected = oracles_data.shifted(spectrogram.numpy(), frames, fill.numpy())
    np.testing.assert_array_equal(random_shift(spectrogram, torch.tensor(frames), fill).numpy(), expected)


def test_spectral_tilt_raises_high_bands():
    got = spectral_tilt(torch.zeros(2, 3, 5), torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(got[0, 1], torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), **TOL[torch.float32])
    torch.testing.assert_close(got[1], torch.ones(3, 5), **TOL[torch.float32])


def test_augment_spectrogram_stays_in_range():
    batch, frames, gain, tilt = 997, 3, 0.5, 0.25
    impulse = torch.zeros(batch, 13, 5)
    impulse[:, 6] = 100.0
    got = augment_spectrogram(impulse, counter_rng(batch), frames=frames, gain=gain, tilt=tilt, fill=torch.zeros(5))
    shift = got[:, :, 2].argmax(dim=1) - 6
    assert sorted(shift.unique().tolist()) == list(range(-frames, frames + 1))
    middle = got[:, 0, 2]
    slope = got[:, 0, 4] - middle
    for values, bound in ((middle, gain), (slope, tilt)):
        assert values.abs().max() <= bound + TOL[torch.float32]["atol"]
        assert values.max() > 0.9 * bound
        assert values.min() < -0.9 * bound
    # The three amounts are independent draws.
    assert torch.corrcoef(torch.stack([shift.float(), middle, slope])).triu(1).abs().max() < 5 / batch**0.5


def test_add_noise_keeps_values_standardized():
    values = torch.randn(997, 101, generator=torch.Generator().manual_seed(0))
    got = add_noise(values, 2.0, counter_rng(997), "hiss")
    error = 5 / got.numel() ** 0.5
    assert abs(got.mean()) < error
    assert abs(got.var() - 1) < error * 2**0.5
    correlation = torch.corrcoef(torch.stack([values.flatten(), got.flatten()]))[0, 1]
    assert abs(correlation - 5**-0.5) < error
