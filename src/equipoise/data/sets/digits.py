"""`digits`: real handwritten digits with synthetic spoken digits, bundled with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..augmentation import add_noise, augment_spectrogram, check_deviations
from ..class_split import sample_kept_classes, split_by_class
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split, split_statistics, standardize
from ..label_pairing import match_by_label, permutation
from ..log_mel_spectrogram import log_mel
from ..pca import fit_pca

VOICES = Path(__file__).with_name("voices.npz")
VOICES_SHA256 = "eda163c045fc3039c9d7ce6858d665fe70a95f9e3be9850340e639cf952df39b"
"""Checksum of the file written by scripts/make_voices.py."""
QUIETEST = -14.0
"""Log energy of level 0 of the stored spectrograms."""
STEP = 0.1
"""Log energy between two consecutive levels."""
FLOOR = 1e-6
"""Floor of the energies, as in scripts/make_voices.py."""
SIZES = {"train": 1000, "val": 300, "test": 497}
VAL_RENDERING = 3
"""Rendering of the training voices that is used for validation and not for training."""
MOST_FRAMES, MOST_GAIN, MOST_TILT = 6, 0.3, 0.3


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, each with a spoken digit of the same label.

    Inputs are "audio" (64, 40), a log-mel spectrogram of a synthetic voice, and "image" (1, 8, 8). Both are
    degraded so that each modality alone is informative but not sufficient. The eight voices of the test split occur in
    no other split. See docs/data/digits.md.

    Args:
        audio_noise: standard deviation of the noise added to the standardized spectrogram, in every split.
        image_noise: the same for the image.
        energy: fraction of the variance that the principal components of the images explain, in (0, 1].
        held_out: digits excluded from training and testing, such as [7, 8, 9]; the others are relabeled from 0. The
            excluded test samples are ``near_ood``.

    Raises:
        ConfigError: negative noise, an energy outside (0, 1], held-out digits that do not exist or leave fewer than
            two.

    Example:
        >>> data = Digits()
        >>> data.shapes, len(data.train), len(data.val), len(data.test)
        ({'audio': (64, 40), 'image': (1, 8, 8)}, 1000, 300, 497)
    """

    names = ("audio", "image")
    num_outputs = 10

    def __init__(
        self, *, audio_noise: float = 2.0, image_noise: float = 0.5, energy: float = 0.4, held_out: Sequence[int] = ()
    ) -> None:
        check_deviations("Digits", audio_noise=audio_noise, image_noise=image_noise)
        retained = sample_kept_classes(held_out, 10, "Digits")
        self._deviation, self.num_outputs = {"audio": audio_noise, "image": image_noise}, len(retained)
        images, labels = _images()
        order = permutation(len(labels), "digits/images")
        rows = dict(zip(SIZES, order.split(list(SIZES.values())), strict=True))
        levels, spoken, voices = _voices()
        chosen = {
            name: voices[name][match_by_label(labels[row], spoken[voices[name]], f"digits/{name}")]
            for name, row in rows.items()
        }
        is_trained = torch.isin(labels[rows["train"]], retained)
        self._components = fit_pca(images[rows["train"][is_trained]], energy)
        self._reference = {
            "audio": levels[chosen["train"][is_trained]],
            "image": self._components.reconstruct(images[rows["train"][is_trained]]),
        }
        splits, held = {}, {}
        for name, row in rows.items():
            whole = Split(self._standardized(levels[chosen[name]], images[row]), labels[row])
            splits[name], held[name] = split_by_class(whole, retained)
        self.train, self.val, self.test = splits["train"], splits["val"], splits["test"]
        self.near_ood = held["test"] if len(retained) < 10 else None
        self.noise = split_statistics(self.train.inputs)
        self._silence = standardize(torch.full((40,), float(levels.min())), self._reference["audio"])

    def far_ood_inputs(
        self, pictures: Float[Tensor, "sample 8 8"], sounds: Float[Tensor, "sample 5120"]
    ) -> dict[str, Tensor]:
        levels = ((log_mel(sounds, FLOOR) - QUIETEST) / STEP).round().clamp(0, 255)
        return self._standardized(levels * STEP + QUIETEST, pictures.flatten(1))

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        audio = inputs["audio"]
        if train:
            audio = augment_spectrogram(
                audio, draw, frames=MOST_FRAMES, gain=MOST_GAIN, tilt=MOST_TILT, fill=self._silence
            )
        return {
            "audio": add_noise(audio, self._deviation["audio"], draw, "audio"),
            "image": add_noise(inputs["image"], self._deviation["image"], draw, "image"),
        }

    def _standardized(self, levels: Tensor, images: Float[Tensor, "sample 64"]) -> dict[str, Tensor]:
        pixels = standardize(self._components.reconstruct(images), self._reference["image"])
        return {"audio": standardize(levels, self._reference["audio"]), "image": pixels.reshape(-1, 1, 8, 8)}


def _images() -> tuple[Tensor, Tensor]:
    """Returns (1797, 64) pixels in [0, 1] and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels / 16).float(), torch.from_numpy(labels).long()


def _voices() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns (960, 64, 40) log-mel spectrograms, their digits, and {split: positions of its recordings}."""
    with np.load(VOICES) as stored:
        levels = torch.from_numpy(stored["levels"]).float() * STEP + QUIETEST
        digit, held_out = torch.from_numpy(stored["digit"]).long(), torch.from_numpy(stored["held_out"])
        last = torch.from_numpy(stored["rendering"]) == VAL_RENDERING
    masks = {"train": ~held_out & ~last, "val": ~held_out & last, "test": held_out}
    return levels, digit, {name: mask.nonzero()[:, 0] for name, mask in masks.items()}
