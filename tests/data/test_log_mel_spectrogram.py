"""Log-mel spectrograms and principal components against their obvious forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.log_mel_spectrogram import framed, log_mel, mel_bands
from equipoise.data.pca import fit_pca
from equipoise.errors import ConfigError
from helpers.tolerance import TOL
from oracles import data as oracles_data


def test_log_mel_against_explicit_sums():
    waveform = torch.randn(5120, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 5120)
    expected = oracles_data.log_mel(waveform.numpy(), 1e-2)
    # Where bands are nearly silent the logarithm magnifies single precision's rounding of 256 terms.
    torch.testing.assert_close(
        log_mel(waveform[None], 1e-2)[0].double(), torch.from_numpy(expected), **TOL[torch.float16]
    )


@pytest.mark.parametrize("frequency", [200, 1000, 3000])
def test_tone_is_loudest_in_its_band(frequency):
    time = torch.arange(5120) / 8000
    heard = log_mel(torch.sin(2 * torch.pi * frequency * time)[None], 1e-6)[0, 32]
    step = 2595 * np.log10(1 + 4000 / 700) / 41
    assert abs(int(heard.argmax()) + 1 - 2595 * np.log10(1 + frequency / 700) / step) <= 0.51


def test_silence_equals_the_floor_and_no_band_is_empty():
    assert torch.equal(log_mel(torch.zeros(1, 5120), 1.0), torch.zeros(1, 64, 40))
    assert (mel_bands().amax(dim=1) > 0.3).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12_000))
def test_framing_keeps_the_center(length):
    recording = torch.arange(1.0, length + 1)
    got = framed(recording)
    assert got.shape == (5120,)
    kept = got[got > 0]
    assert len(kept) == min(length, 5120)
    assert torch.equal(kept, recording[recording >= kept[0]][: len(kept)])
    left, right = int(kept[0]) - 1, length - int(kept[-1])
    assert abs(left - right) <= 1


@pytest.mark.parametrize("energy", [0.25, 0.6, 1.0])
def test_components_are_the_singular_vectors(energy):
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(31, 7, generator=generator) * torch.arange(1, 8) + 3
    images = torch.randn(5, 7, generator=generator) + 3
    count, expected = oracles_data.reconstructed(train.double().numpy(), images.double().numpy(), energy)
    components = fit_pca(train, energy)
    assert len(components.directions) == count
    torch.testing.assert_close(components.reconstruct(images), torch.from_numpy(expected).float(), **TOL[torch.float32])


@pytest.mark.parametrize("energy", [0.0, 1.1])
def test_invalid_explained_variance_raises(energy):
    with pytest.raises(ConfigError, match=rf"fit_pca: expected an energy in \(0, 1\], got {energy}"):
        fit_pca(torch.zeros(3, 2), energy)
