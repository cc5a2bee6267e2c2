"""`digits`: real handwritten digits with synthetic spoken digits, bundled with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .augment import check_deviations, noisy, varied
from .base import Dataset, Split, standardised, statistics
from .components import principal_components
from .pairing import paired, shuffled
from .randomness import Draw

VOICES = Path(__file__).with_name("voices.npz")
VOICES_SHA256 = "eda163c045fc3039c9d7ce6858d665fe70a95f9e3be9850340e639cf952df39b"
"""Of the file that scripts/make_voices.py wrote."""
QUIETEST = -14.0
"""Log energy that level 0 of the stored spectrograms stands for."""
STEP = 0.1
"""Log energy between two levels."""
SIZES = {"train": 1000, "val": 300, "test": 497}
VAL_RENDERING = 3
"""The rendering of the training voices that validation hears and training does not."""
MOST_FRAMES, MOST_GAIN, MOST_TILT = 6, 0.3, 0.3


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, each with a spoken digit of the same label.

    Inputs are "audio" (64, 40), a log-mel spectrogram of a synthetic voice, and "image" (1, 8, 8). Both are spoilt on
    purpose, so that each alone is worth something and neither is enough. The eight voices of the test split are heard
    in no other split. See docs/data/digits.md.

    Args:
        audio_noise: standard deviation of the noise added to the standardised spectrogram, in every split.
        image_noise: the same for the image.
        energy: part of the variance that the image's principal components keep, in (0, 1].

    Raises:
        ConfigError: negative noise, or an energy outside (0, 1].

    Example:
        >>> data = Digits()
        >>> data.shapes, len(data.train), len(data.val), len(data.test)
        ({'audio': (64, 40), 'image': (1, 8, 8)}, 1000, 300, 497)
    """

    names = ("audio", "image")
    num_outputs = 10

    def __init__(self, *, audio_noise: float = 2.0, image_noise: float = 0.5, energy: float = 0.4) -> None:
        check_deviations("Digits", audio_noise=audio_noise, image_noise=image_noise)
        self._deviation = {"audio": audio_noise, "image": image_noise}
        images, labels = _images()
        order = shuffled(len(labels), "digits/images")
        rows = dict(zip(SIZES, order.split(list(SIZES.values())), strict=True))
        components = principal_components(images[rows["train"]], energy)
        levels, spoken, voices = _voices()
        chosen = {
            name: voices[name][paired(labels[row], spoken[voices[name]], f"digits/{name}")]
            for name, row in rows.items()
        }
        pixels = {name: components.reconstruct(images[row]).reshape(-1, 1, 8, 8) for name, row in rows.items()}
        heard = {name: levels[row] for name, row in chosen.items()}
        splits = {
            name: Split(
                {
                    "audio": standardised(heard[name], heard["train"]),
                    "image": standardised(pixels[name], pixels["train"]),
                },
                labels[row],
            )
            for name, row in rows.items()
        }
        self.train, self.val, self.test = splits["train"], splits["val"], splits["test"]
        self.noise = statistics(self.train.inputs)
        self._silence = standardised(torch.full((40,), float(levels.min())), heard["train"])

    def augment(self, inputs: dict[str, Tensor], draw: Draw, *, train: bool) -> dict[str, Tensor]:
        audio = inputs["audio"]
        if train:
            audio = varied(audio, draw, frames=MOST_FRAMES, gain=MOST_GAIN, tilt=MOST_TILT, fill=self._silence)
        return {
            "audio": noisy(audio, self._deviation["audio"], draw, "audio"),
            "image": noisy(inputs["image"], self._deviation["image"], draw, "image"),
        }


def _images() -> tuple[Tensor, Tensor]:
    """(1797, 64) pixels in [0, 1] and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels / 16).float(), torch.from_numpy(labels).long()


def _voices() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(960, 64, 40) log-mel spectrograms, their digits, and the positions that belong to each split."""
    with np.load(VOICES) as stored:
        levels = torch.from_numpy(stored["levels"]).float() * STEP + QUIETEST
        digit, held_out = torch.from_numpy(stored["digit"]).long(), torch.from_numpy(stored["held_out"])
        last = torch.from_numpy(stored["rendering"]) == VAL_RENDERING
    belongs = {"train": ~held_out & ~last, "val": ~held_out & last, "test": held_out}
    return levels, digit, {name: member.nonzero()[:, 0] for name, member in belongs.items()}
