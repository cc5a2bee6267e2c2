"""Layout of Kinetics-Sounds.

Frames at one per second, log-mel filter banks or wav files, and the lists of OGM or RollingQ.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ..media_files import load_audio, read_audio
from . import raw_folder
from .cremad import folder_images
from .fixed_spectrograms import fbank_1024, spectrogram_1004
from .frame_arrays import middle_frames, read_frames
from .published_layout import Layout, Option, RawSample, Scan, Settings
from .raw_folder import Place
from .split_assignment import hold_out_validation

CLASSES = (
    "blowing nose",
    "blowing out candles",
    "bowling",
    "chopping wood",
    "dribbling basketball",
    "laughing",
    "mowing lawn",
    "playing accordion",
    "playing bagpipes",
    "playing bass guitar",
    "playing clarinet",
    "playing drums",
    "playing guitar",
    "playing harmonica",
    "playing keyboard",
    "playing organ",
    "playing piano",
    "playing saxophone",
    "playing trombone",
    "playing trumpet",
    "playing violin",
    "playing xylophone",
    "ripping paper",
    "shoveling snow",
    "shuffling cards",
    "singing",
    "stomping grapes",
    "tap dancing",
    "tapping guitar",
    "tapping pen",
    "tickling",
)
LISTS = {
    split: tuple(pattern.format(split) for pattern in ("{}.csv", "{}.txt", "my_{}.txt", "ks_{}_overlap.txt"))
    for split in ("train", "test")
}
FEWEST_FRAMES = 4
YOUTUBE = re.compile(r"([\w-]{11})(?:_\d{6}_\d{6})?")


class KineticsSounds(Layout):
    """Kinetics-Sounds: clips of 10 s from YouTube in 31 classes that can be seen and heard.

    Clips with three frames or fewer are dropped, as the published loader does. Validation is a tenth of the training
    list, of every class alike; the published loaders validate on the test list.
    """

    name = "kinetics_sounds"
    title = "Kinetics-Sounds"
    source = "Arandjelovic and Zisserman, Look, Listen and Learn (ICCV 2017); clips of Kinetics-400"
    license = "lists CC BY 4.0; the clips belong to their uploaders"
    groups = "source video"
    columns = {"audio": "array", "image": "frames"}  # noqa: RUF012
    places = {  # noqa: RUF012
        "train": Place(LISTS["train"], "lines 'clip,10,label' or 'clip ... label'"),
        "test": Place(LISTS["test"], "lines 'clip,10,label' or 'clip ... label'"),
        "audio": Place(("audio", "audio_npy", "audio_wav"), "{clip}.npy (1024, 128), or {clip}.wav"),
        "frames": Place(("visual", "frames", "Image-01-FPS"), "{clip}/frame_00001.jpg ..., one for each second"),
    }
    options = {  # noqa: RUF012
        "audio": Option("fbank1024", ("fbank1024", "spec1004", "wav"), "what wav files are converted to"),
        "frames": Option(3, None, "frames for each clip"),
        "size": Option(224, None, "height and width of the frames"),
    }
    published = {"train": 14_799, "test": 2597}  # noqa: RUF012

    def scan(self, settings: Settings) -> Scan:
        raw = settings.raw
        audio, frames = raw.require("audio"), raw.require("frames")
        samples, places = [], []
        for split in ("train", "test"):
            path = raw.require(split)
            for number, values in raw_folder.read_list(path, 2, last=1):
                clip, location = values[0], f"line {number} of {path.name}"
                places.append((clip, location))
                target = raw_folder.check_label(values[-1], len(CLASSES), f"list '{path}', line {number}")
                sound = _existing(audio, split, f"{clip}.npy") or _existing(audio, split, f"{clip}.wav")
                files = {
                    "audio": [str(sound or audio / f"{clip}.npy")],
                    "image": [str(_existing(frames, split, clip) or frames / clip)],
                }
                video = YOUTUBE.fullmatch(clip)
                samples.append(
                    RawSample(clip, split, target, video[1] if video else clip, CLASSES[target], files)
                )  # fmt: skip
        raw_folder.check_unique(places)
        return Scan(hold_out_validation(samples), classes=list(CLASSES))

    def convert(self, sample: RawSample, settings: Settings) -> dict[str, Any]:
        count, size = settings.options["frames"], settings.options["size"]
        paths = folder_images(Path(sample.files["image"][0]), settings.raw)
        if len(paths) < FEWEST_FRAMES:
            raise DataError(f"frames of '{sample.id}'", expected=f"{FEWEST_FRAMES} images or more", got=f"{len(paths)}")
        image = read_frames([paths[i] for i in _positions(len(paths), count)], size)
        return {"audio": _audio(Path(sample.files["audio"][0]), settings.options["audio"]), "image": image}


def _positions(available: int, count: int) -> list[int]:
    """The published rule: the first frame only in clips of six or fewer, and never a frame after the ninth."""
    if available <= 6:
        return [0] * count
    return [min(index, 8) for index in middle_frames(available, count)]


def _audio(path: Path, kind: str) -> np.ndarray | Path:
    if path.suffix.lower() == ".npy":
        return read_array(path, 2)
    if kind == "wav":
        load_audio(path)
        return path
    return (fbank_1024 if kind == "fbank1024" else spectrogram_1004)(read_audio(path, 16_000))


def read_array(path: Path, dimensions: int) -> np.ndarray:
    """Reads a .npy file without executing it.

    Raises:
        DataError: the file is missing, truncated or no array, contains objects, or has another number of dimensions.
    """
    who = f"array '{path}'"
    if not path.is_file() or not path.stat().st_size:
        raise DataError(who, expected="an array", got="an empty file" if path.is_file() else "no such file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # numpy raises several kinds of errors on invalid content.
    except Exception as error:
        objects = "pickle" in str(error).lower() or "object" in str(error).lower()
        raise DataError(
            who, expected="numbers in numpy's format", got="Python objects" if objects else "a damaged file",
            fix="Convert them to numbers." if objects else "Fetch the file again.",
        ) from error  # fmt: skip
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.ndim != dimensions:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise DataError(who, expected=f"numbers in {dimensions} dimensions", got=got)
    return array


def _existing(folder: Path, split: str, name: str) -> Path | None:
    """Returns the path of a file in the folder or in the subfolder of its split."""
    for path in (folder / name, folder / split / name, folder / f"{split}_img" / "Image-01-FPS" / name):
        if path.exists():
            return path
    return None
