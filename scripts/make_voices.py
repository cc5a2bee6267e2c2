"""Generates src/equipoise/data/sets/voices.npz: ten spoken digits by 24 synthetic voices, four renderings each.

Needs espeak-ng 1.51 (Debian: apt-get install espeak-ng) and scipy. Run it from the repository root:

    python scripts/make_voices.py

The same versions of espeak-ng, torch and zlib produce the same file, byte for byte. A test compares its SHA-256 with
VOICES_SHA256 in src/equipoise/data/sets/digits.py, so that the file cannot change accidentally.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import scipy.signal
import torch

from equipoise.data.log_mel_spectrogram import RATE, framed, log_mel
from equipoise.data.sets.digits import QUIETEST, STEP

TRAIN_VOICES = (
    "en-us+m1", "en+f1", "en-gb-scotland+m2", "en-gb-x-gbclan+f2", "en-gb-x-rp+m3", "en-gb-x-gbcwmd+f3",
    "en-029+m4", "en-us-nyc+f4", "en-us+Annie", "en+Andy", "en-gb-scotland+steph", "en-gb-x-gbclan+Gene",
    "en-gb-x-rp+belinda", "en-gb-x-gbcwmd+david", "en-029+linda", "en-us-nyc+pablo",
)  # fmt: skip
TEST_VOICES = (
    "en-us+f5", "en+m5", "en-gb-scotland+Alicia", "en-gb-x-gbclan+grandpa", "en-gb-x-rp+anika", "en-gb-x-gbcwmd+m8",
    "en-029+Andrea", "en-us-nyc+john",
)  # fmt: skip
RENDERINGS = ((30, 150), (45, 170), (60, 190), (50, 160))
"""(pitch, words per minute) of the renderings 0 to 3."""
FLOOR = 1e-6
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TARGET = Path(__file__).parents[1] / "src/equipoise/data/sets/voices.npz"


def main() -> None:
    rows = [
        (digit, voice, rendering)
        for voice in range(len(TRAIN_VOICES) + len(TEST_VOICES))
        for rendering in range(len(RENDERINGS))
        for digit in range(10)
    ]
    names = TRAIN_VOICES + TEST_VOICES
    spoken = torch.stack([framed(trim_silence(speak(WORDS[d], names[v], *RENDERINGS[r]))) for d, v, r in rows])
    levels = ((log_mel(spoken, FLOOR) - QUIETEST) / STEP).round().clamp(0, 255).to(torch.uint8).numpy()
    digit, voice, rendering = (np.array(column, dtype=np.uint8) for column in zip(*rows, strict=True))
    held_out = voice >= len(TRAIN_VOICES)
    write(
        TARGET, levels=levels, digit=digit, voice=voice, rendering=rendering, held_out=held_out, names=np.array(names)
    )
    print(f"{TARGET.name}: {len(rows)} recordings, {TARGET.stat().st_size} bytes")  # noqa: T201
    print(f"SHA-256 {hashlib.sha256(TARGET.read_bytes()).hexdigest()}")  # noqa: T201


def speak(word: str, voice: str, pitch: int, speed: int) -> torch.Tensor:
    """Synthesizes a word with espeak-ng and returns it at 8 kHz with a peak of 0.5."""
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "-b", "1", "--stdout", word]
    done = subprocess.run(command, check=True, capture_output=True)
    if done.stderr:
        raise RuntimeError(f"espeak-ng -v {voice}: {done.stderr.decode()}")
    # On a pipe espeak-ng cannot seek back to write the length, so the length in the header is a placeholder.
    header, samples = done.stdout[:44], done.stdout[44:]
    rate = int.from_bytes(header[24:28], "little")
    values = np.frombuffer(samples[: len(samples) // 2 * 2], dtype="<i2").astype(np.float64) / 2**15
    resampled = scipy.signal.resample_poly(values, RATE, rate)
    return torch.from_numpy(0.5 * resampled / np.abs(resampled).max()).float()


def trim_silence(recording: torch.Tensor) -> torch.Tensor:
    """Returns the part between the first and the last sample that reach 2 % of the peak."""
    loud = (recording.abs() >= 0.02 * recording.abs().max()).nonzero()[:, 0]
    return recording[loud[0] : loud[-1] + 1]


def write(path: Path, **arrays: np.ndarray) -> None:
    """Writes an npz file with fixed timestamps, so that its bytes are reproducible."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(1, 0))
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


if __name__ == "__main__":
    main()
