"""`av_digits`: recorded digits of six speakers (FSDD) with handwritten digits (MNIST)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
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

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
FOLDS = {
    "A": ("theo", "yweweler"),
    "B": ("george", "jackson"),
    "C": ("lucas", "nicolas"),
    **{"-".join(pair): pair for pair in combinations(SPEAKERS, 2)},
}
"""Fold -> speakers of the test split, absent from training and validation."""
VAL_TAKES = 5
"""Takes 0 to 4 of each digit and training speaker form the validation split."""
SIZES = {"train": 4000, "val": 1000}
"""Number of images per split; the remaining ones form the test split."""
FLOOR = 1e-6
"""Floor of the log-mel energies, far below the quietest speaker."""
MOST_FRAMES, MOST_GAIN, MOST_TILT = 4, 0.1, 0.1
"""Small on purpose: speakers differ by more, so generalizing to new speakers stays hard."""
SOURCE = {
    "fsdd/recordings": "It contains the Free Spoken Digit Dataset, doi 10.5281/zenodo.1342401.",
    "mnist": "It contains MNIST's t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz (LeCun, Cortes, Burges).",
}


class AVDigits(Dataset):
    """The Free Spoken Digit Dataset with the 10,000 test images of MNIST, paired by label.

    Inputs are "audio" (64, 40), a log-mel spectrogram, and "image" (1, 28, 28), a reconstruction from the principal
    components that explain a quarter of the variance. Two of the six speakers occur in the test split only. See
    docs/data/av_digits.md.

    Args:
        root: folder that contains ``fsdd/recordings`` and ``mnist``; EQUIPOISE_DATA takes precedence.
        fold: "A" tests on theo and yweweler, "B" on george and jackson, "C" on lucas and nicolas. Tune on A only. Or
            a pair of test speakers in alphabetical order, such as "george-theo".
        audio_noise: standard deviation of the noise added to the standardized spectrogram, in every split.
        energy: fraction of the variance that the principal components of the images explain, in (0, 1].
        held_out: digits excluded from training and testing, such as [7, 8, 9]; the others are relabeled from 0. The
            excluded test samples are ``near_ood``.

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
        retained = sample_kept_classes(held_out, 10, "AVDigits")
        self.fold, self._audio_noise, self.num_outputs = fold, audio_noise, len(retained)
        spoken = read_recordings(find_data_dir("fsdd/recordings", root, SOURCE["fsdd/recordings"]), SPEAKERS, FLOOR)
        images, labels = _mnist(find_data_dir("mnist", root, SOURCE["mnist"]))
        order = permutation(len(labels), "av_digits/images")
        sizes = [*SIZES.values(), len(labels) - sum(SIZES.values())]
        rows = dict(zip(("train", "val", "test"), order.split(sizes), strict=True))
        train_rows = rows["train"][torch.isin(labels[rows["train"]], retained)]
        self._components = fit_pca(images[train_rows], energy)
        voices = _voices(spoken, fold)
        train_voices = voices["train"][torch.isin(spoken.digit[voices["train"]], retained)]
        self._reference = {
            "audio": spoken.spectrograms[train_voices], "image": self._components.reconstruct(images[train_rows])
        }  # fmt: skip
        splits, held = {}, {}
        for name, row in rows.items():
            partner = voices[name][match_by_label(labels[row], spoken.digit[voices[name]], f"av_digits/{fold}/{name}")]
            inputs = self._standardized(spoken.spectrograms[partner], images[row])
            speakers = [SPEAKERS[number] for number in spoken.speaker[partner].tolist()]
            splits[name], held[name] = split_by_class(Split(inputs, labels[row], groups=speakers), retained)
        self.train, self.val, self.test = splits["train"], splits["val"], splits["test"]
        self.near_ood = held["test"] if len(retained) < 10 else None
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
    """Returns (10000, 784) pixels in [0, 1] and their labels."""
    path = folder / "t10k-labels-idx1-ubyte.gz"
    images, labels = read_idx(folder / "t10k-images-idx3-ubyte.gz", 3), read_idx(path, 1)
    if len(images) != len(labels):
        raise DataError(str(path), expected=f"as many labels as images = {len(images)}", got=f"{len(labels)}")
    if len(images) <= sum(SIZES.values()):
        raise DataError(str(path), expected=f"more than {sum(SIZES.values())} samples", got=f"{len(images)}")
    return images.flatten(1).float() / 255, labels.long()


def _voices(spoken: Recordings, fold: str) -> dict[str, Tensor]:
    """Returns {split: positions of its recordings}."""
    is_test_speaker = torch.tensor([SPEAKERS[s] in FOLDS[fold] for s in spoken.speaker.tolist()])
    is_val_take = spoken.take < VAL_TAKES
    masks = {"train": ~is_test_speaker & ~is_val_take, "val": ~is_test_speaker & is_val_take, "test": is_test_speaker}
    return {name: mask.nonzero()[:, 0] for name, mask in masks.items()}
