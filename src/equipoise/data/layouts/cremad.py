"""Layout of CREMA-D: wav files, frames or videos, and the random split that was published with OGM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ..media_files import load_audio, read_audio
from . import raw_folder
from .fixed_spectrograms import spectrogram_299, stft_188
from .frame_arrays import IMAGES, decode_frames, middle_frames, read_frames, require_torchcodec
from .published_layout import Layout, Option, RawSample, Scan, Settings
from .raw_folder import Place, RawFolder
from .split_assignment import hold_out_validation

EMOTIONS = {"NEU": "neutral", "HAP": "happy", "SAD": "sad", "FEA": "fear", "DIS": "disgust", "ANG": "anger"}
STEM = re.compile(r"(\d{4})_([A-Z]{3})_(NEU|HAP|SAD|FEA|DIS|ANG)_([A-Z]+)")
FEATURES = {"stft188": (22_050, stft_188), "spec299": (16_000, spectrogram_299)}


class CREMAD(Layout):
    """CREMA-D: 7,442 clips of 91 actors who say one of 12 sentences with one of six emotions.

    The label is the emotion that the actor intended, from the name of the file. The published split is random, so that
    all actors occur in training and test; validation is a tenth of the training list, of every class alike.
    """

    name = "cremad"
    title = "CREMA-D"
    source = "https://github.com/CheyneyComputerScience/CREMA-D"
    license = "ODbL 1.0"
    groups = "actor"
    columns = {"audio": "array", "image": "frames"}  # noqa: RUF012
    places = {  # noqa: RUF012
        "audio": Place(("AudioWAV", "audio"), "{stem}.wav, or {stem}.pt with a spectrogram"),
        "frames": Place(
            ("Image-01-FPS", "Image-02-FPS", "Image-03-FPS", "visual", "frames"), "{stem}/*.jpg", required=False
        ),
        "video": Place(("VideoFlash", "VideoMP4", "video"), "{stem}.flv, if there are no frames", required=False),
        "train": Place(("train.csv", "CREMAD/train.csv", "annotations/train.csv"), "lines 'stem,EMO'", required=False),
        "test": Place(("test.csv", "CREMAD/test.csv", "annotations/test.csv"), "lines 'stem,EMO'", required=False),
    }
    options = {  # noqa: RUF012
        "audio": Option("stft188", ("stft188", "spec299", "wav"), "spectrogram of the paper, or the wav files"),
        "frames": Option(1, None, "frames for each clip"),
        "size": Option(224, None, "height and width of the frames"),
    }
    published = {"train": 6698, "test": 744}  # noqa: RUF012

    def scan(self, settings: Settings) -> Scan:
        raw = settings.raw
        audio = raw.require("audio")
        frames, video = raw.find("frames"), raw.find("video")
        if frames is None and video is None:
            raise raw.missing("frames")
        if frames is None:
            require_torchcodec(f"data prepare {self.name}", "Image-01-FPS/{stem}/*.jpg")
        sounds = {Path(name).stem: name for name in raw_folder.list_files(audio, (".pt", ".wav"))}
        listed = _listed(raw) if settings.options["split"] == "published" else [(stem, "", "") for stem in sounds]
        samples, dropped = [], {}
        for stem, split, emotion in sorted(listed):
            parts = STEM.fullmatch(stem)
            if parts is None:
                dropped[stem] = f"name '{stem}': expected actor_sentence_EMOTION_level."
            elif emotion and emotion != parts[3]:
                dropped[stem] = f"list: expected the emotion in the name '{stem}', got '{emotion}'."
            else:
                sound = sounds.get(stem, f"{stem}.wav")
                files = {"audio": [str(audio / sound)]}
                if frames is not None:
                    files["image"] = [str(frames / stem)]
                elif video is not None:
                    files["video"] = [str(video / name) for name in _videos(video, stem)]
                label = parts[3]
                samples.append(
                    RawSample(stem, split, list(EMOTIONS).index(label), parts[1], EMOTIONS[label], files)
                )  # fmt: skip
        unlisted = len(set(sounds) - {stem for stem, _, _ in listed})
        notes = [f"{unlisted} recordings are in none of the lists."] if unlisted else []
        return Scan(hold_out_validation(samples), dropped, notes, list(EMOTIONS.values()))

    def convert(self, sample: RawSample, settings: Settings) -> dict[str, Any]:
        return {"audio": self._audio(sample, settings), "image": self._image(sample, settings)}

    def _audio(self, sample: RawSample, settings: Settings) -> np.ndarray | Path:
        path, kind = Path(sample.files["audio"][0]), settings.options["audio"]
        if path.suffix.lower() == ".pt":
            return read_tensor(path)
        if kind == "wav":
            load_audio(path)
            return path
        rate, spectrogram = FEATURES[kind]
        return spectrogram(read_audio(path, rate))

    def _image(self, sample: RawSample, settings: Settings) -> np.ndarray:
        count, size = settings.options["frames"], settings.options["size"]
        if "image" not in sample.files:
            if not sample.files["video"]:
                raise DataError(f"video of '{sample.id}'", expected="a video", got="no such file")
            return decode_frames(Path(sample.files["video"][0]), lambda n: middle_frames(n, count), size)
        paths = folder_images(Path(sample.files["image"][0]), settings.raw)
        return read_frames([paths[i] for i in middle_frames(len(paths), count)], size)


def folder_images(folder: Path, raw: RawFolder) -> list[Path]:
    """Returns the sorted images of a folder.

    Raises:
        DataError: the folder is missing or has none, or an image is a link out of the data set.
    """
    if not folder.is_dir():
        raise DataError(f"frames '{folder}'", expected="a folder of images", got="no such folder")
    images = [raw.inside(folder / name) for name in raw_folder.list_files(folder, IMAGES)]
    if not images:
        raise DataError(f"frames '{folder}'", expected="images", got="a folder without any")
    return images


def read_tensor(path: Path) -> np.ndarray:
    """Reads a spectrogram that torch saved, without executing the file.

    Raises:
        DataError: the file is missing or damaged, or contains anything but one floating tensor (time, frequency).
    """
    import torch

    who = f"audio '{path}'"
    if not path.is_file() or not path.stat().st_size:
        raise DataError(who, expected="a tensor", got="an empty file" if path.is_file() else "no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises many kinds of errors on invalid content.
    except Exception as error:
        raise DataError(
            who, expected="one tensor, as torch.save writes it", got="a damaged file, or one with other objects"
        ) from error
    if not isinstance(content, torch.Tensor) or not content.is_floating_point() or content.squeeze().ndim != 2:
        shape = (
            f"{content.dtype} {tuple(content.shape)}" if isinstance(content, torch.Tensor) else type(content).__name__
        )
        raise DataError(who, expected="a floating tensor (time, frequency)", got=shape)
    return content.squeeze().float().numpy()


def _listed(raw: RawFolder) -> list[tuple[str, str, str]]:
    """Returns (stem, split, emotion) of the published lists."""
    rows, places = [], []
    for split in ("train", "test"):
        if raw.find(split) is None:
            error = raw.missing(split)
            raise DataError(
                error.who, expected=error.expected, got=error.got,
                fix=f"{error.fix} Or use --split disjoint, which needs no lists.",
            )  # fmt: skip
        path = raw.require(split)
        for number, values in raw_folder.read_list(path, 2):
            rows.append((values[0], split, values[1]))
            places.append((values[0], f"line {number} of {path.name}"))
    raw_folder.check_unique(places)
    return rows


def _videos(folder: Path, stem: str) -> list[str]:
    return [f"{stem}{suffix}" for suffix in (".flv", ".mp4", ".avi") if (folder / f"{stem}{suffix}").exists()][:1]
