"""`av_digits`: recorded digits of six speakers (FSDD) with handwritten digits (MNIST)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import DataError, unknown_name
from ..augmentation import add_noise, augment_spectrogram, check_deviations
from ..class_split import sample_kept_classes, split_by_class
from ..counter_rng import CounterRNG
from ..data_root import find_data_dir
from ..dataset import Dataset, Split, split_statistics, standardize
from ..label_pairing import match_by_label, permutation
from ..log_mel_spectrogram import log_mel
from ..pca import fit_pca
from .idx_files import read_idx
from .spoken_digits_files import Recordings, read_recordings

FOLDS = {"A": ("theo", "yweweler"), "B": ("george", "jackson"), "C": ("lucas", "nicolas")}
"""Speakers that only the test split hears."""
SPEAKERS = tuple(sorted(speaker for pair in FOLDS.values() for speaker in pair))
VAL_TAKES = 5
"""Of every digit and training speaker, takes 0 to 4 are kept for validation."""
SIZES = {"train": 4000, "val": 1000}
"""Images; the rest is for the test."""
FLOOR = 1e-6
"""Of the log-mel energies: far below the softest speech, so that nobody is inaudible."""
MOST_FRAMES, MOST_GAIN, MOST_TILT = 4, 0.1, 0.1
"""Little variation: speakers differ by more than this, so audio of unheard speakers is hard, as it is meant to be."""
SOURCE = {
    "fsdd/recordings": "It holds the Free Spoken Digit Dataset, doi 10.5281/zenodo.1342401.",
    "mnist": "It holds MNIST's t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz (LeCun, Cortes, Burges).",
}


class AVDigits(Dataset):
    """The Free Spoken Digit Dataset with the 10,000 test images of MNIST, paired by label.

    Inputs are "audio" (64, 40), a log-mel spectrogram, and "image" (1, 28, 28), a reconstruction from the principal
    components that hold a quarter of the energy. Two of six speakers are heard in the test split alone. See
    docs/data/av_digits.md.

    Args:
        root: folder that holds ``fsdd/recordings`` and ``mnist``; looked at after the environment's EQUIPOISE_DATA.
        fold: "A" tests on theo and yweweler, "B" on george and jackson, "C" on lucas and nicolas. Tune on A alone.
        audio_noise: standard deviation of the noise added to the standardized spectrogram, in every split.
        energy: part of the variance that the image's principal components keep, in (0, 1].
        held_out: digits that are neither trained nor tested, such as [7, 8, 9]; the others are renumbered from 0. Those
            of the test split are ``near_ood``.

    Raises:
        ConfigError: an unknown fold, negative noise, an energy outside (0, 1], held-out digits that do not exist or
            leave fewer than two.
        DataError: a missing folder, or a damaged file.
    """

    names = ("audio", "image")
    num_outputs = 10

    def __init__(
        self, root: str | Path | None = None, *, fold: str = "A", audio_noise: float = 1.0, energy: float = 0.25,
        held_out: Sequence[int] = (),
    ) -> None:  # fmt: skip
        if fold not in FOLDS:
            raise unknown_name("AVDigits", "fold", fold, FOLDS)
        check_deviations("AVDigits", audio_noise=audio_noise)
        kept = sample_kept_classes(held_out, 10, "AVDigits")
        self.fold, self._audio_noise, self.num_outputs = fold, audio_noise, len(kept)
        spoken = read_recordings(find_data_dir("fsdd/recordings", root, SOURCE["fsdd/recordings"]), SPEAKERS, FLOOR)
        images, labels = _mnist(find_data_dir("mnist", root, SOURCE["mnist"]))
        order = permutation(len(labels), "av_digits/images")
        sizes = [*SIZES.values(), len(labels) - sum(SIZES.values())]
        rows = dict(zip(("train", "val", "test"), order.split(sizes), strict=True))
        taught = rows["train"][torch.isin(labels[rows["train"]], kept)]
        self._components = fit_pca(images[taught], energy)
        voices = _voices(spoken, fold)
        heard = voices["train"][torch.isin(spoken.digit[voices["train"]], kept)]
        self._reference = {
            "audio": spoken.spectrograms[heard], "image": self._components.reconstruct(images[taught])
        }  # fmt: skip
        splits, held = {}, {}
        for name, row in rows.items():
            partner = voices[name][match_by_label(labels[row], spoken.digit[voices[name]], f"av_digits/{fold}/{name}")]
            inputs = self._standardized(spoken.spectrograms[partner], images[row])
            splits[name], held[name] = split_by_class(Split(inputs, labels[row]), kept)
        self.train, self.val, self.test = splits["train"], splits["val"], splits["test"]
        self.near_ood = held["test"] if len(kept) < 10 else None
        self.noise = split_statistics(self.train.inputs)
        self._silence = standardize(spoken.spectrograms.amin(dim=(0, 1)), self._reference["audio"])

    def far_ood_inputs(
        self, pictures: Float[Tensor, "sample 28 28"], sounds: Float[Tensor, "sample 5120"]
    ) -> dict[str, Tensor]:
        return self._standardized(log_mel(sounds, FLOOR), pictures.flatten(1))

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        audio = inputs["audio"]
        if train:
            audio = augment_spectrogram(
                audio, draw, frames=MOST_FRAMES, gain=MOST_GAIN, tilt=MOST_TILT, fill=self._silence
            )
        return {"audio": add_noise(audio, self._audio_noise, draw, "audio"), "image": inputs["image"]}

    def _standardized(self, spectrograms: Tensor, images: Float[Tensor, "sample 784"]) -> dict[str, Tensor]:
        pixels = standardize(self._components.reconstruct(images), self._reference["image"])
        return {"audio": standardize(spectrograms, self._reference["audio"]), "image": pixels.reshape(-1, 1, 28, 28)}


def _mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """(10000, 784) pixels in [0, 1] and their labels."""
    path = folder / "t10k-labels-idx1-ubyte.gz"
    images, labels = read_idx(folder / "t10k-images-idx3-ubyte.gz", 3), read_idx(path, 1)
    if len(images) != len(labels):
        raise DataError(str(path), expected=f"as many labels as images = {len(images)}", got=f"{len(labels)}")
    if len(images) <= sum(SIZES.values()):
        raise DataError(str(path), expected=f"more than {sum(SIZES.values())} samples", got=f"{len(images)}")
    return images.flatten(1).float() / 255, labels.long()


def _voices(spoken: Recordings, fold: str) -> dict[str, Tensor]:
    """Positions of the recordings that belong to each split."""
    unheard = torch.tensor([SPEAKERS[s] in FOLDS[fold] for s in spoken.speaker.tolist()])
    early = spoken.take < VAL_TAKES
    belongs = {"train": ~unheard & ~early, "val": ~unheard & early, "test": unheard}
    return {name: member.nonzero()[:, 0] for name, member in belongs.items()}
