"""Reads the recordings of the Free Spoken Digit Dataset."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import DataError
from ..log_mel_spectrogram import RATE, framed, log_mel
from ..media_files import load_audio

_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")


@dataclass(frozen=True, eq=False)
class Recordings:
    """Spectrograms of all recordings in a folder, in the order of digit, speaker and take.

    Attributes:
        spectrograms: (recording, 64, 40) log-mel energies.
        digit: (recording,) spoken digit.
        speaker: (recording,) index into the requested speakers.
        take: (recording,) number at the end of the file name.
    """

    spectrograms: Float[Tensor, "recording 64 40"]
    digit: Int[Tensor, " recording"]
    speaker: Int[Tensor, " recording"]
    take: Int[Tensor, " recording"]


def read_recordings(folder: Path, speakers: tuple[str, ...], floor: float) -> Recordings:
    """Reads all wav files of a folder.

    Args:
        folder: contains files named {digit}_{speaker}_{take}.wav, 8 kHz mono.
        speakers: expected speakers; each must have recordings of all digits.
        floor: see ``log_mel``.

    Raises:
        DataError: an invalid file name or file, or a digit without a recording of some speaker.
    """
    labeled = sorted((_labels(path, speakers), path) for path in folder.glob("*.wav"))
    missing = {(d, s) for d in range(10) for s in range(len(speakers))} - {labels[:2] for labels, _ in labeled}
    if missing:
        digit, speaker = min(missing)
        raise DataError(
            str(folder), expected=f"recordings of all digits by {', '.join(speakers)}",
            got=f"{len(labeled)} recordings, none of them {digit}_{speakers[speaker]}_*.wav",
        )  # fmt: skip
    waveforms = torch.stack([framed(read_wav(path)) for _, path in labeled])
    # In chunks: the frames of all recordings at once would take 0.5 GB.
    spectrograms = torch.cat([log_mel(chunk, floor) for chunk in waveforms.split(256)])
    digit, speaker, take = torch.tensor([labels for labels, _ in labeled]).unbind(dim=1)
    return Recordings(spectrograms, digit, speaker, take)


def read_wav(path: Path) -> Float[Tensor, " sample"]:
    """Reads a mono recording at 8 kHz, in [-1, 1].

    Raises:
        DataError: as ``load_audio``; several channels, or another rate.
    """
    values, rate = load_audio(path, who="recording")
    who = f"recording '{path}'"
    if rate != RATE:
        raise DataError(who, expected=f"a rate of {RATE} Hz", got=f"{rate} Hz", fix=f"Resample it to {RATE} Hz.")
    if values.shape[1] != 1:
        raise DataError(who, expected="one channel", got=f"{values.shape[1]}", fix="Mix the channels to one.")
    return torch.from_numpy(values[:, 0])


def _labels(path: Path, speakers: tuple[str, ...]) -> tuple[int, int, int]:
    match = _NAME.fullmatch(path.name)
    if match is None or match[2] not in speakers:
        raise DataError(
            str(path), expected=f"a name {{digit}}_{{speaker}}_{{take}}.wav with a speaker among {', '.join(speakers)}",
            got=repr(path.name), fix="Keep other files out of this folder.",
        )  # fmt: skip
    return int(match[1]), speakers.index(match[2]), int(match[3])
