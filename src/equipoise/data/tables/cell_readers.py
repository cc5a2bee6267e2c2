"""Reads one cell of a table as a tensor: audio, images, video, frames, arrays."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..log_mel_spectrogram import log_mel_frames
from .column_kinds import EXTENSIONS

Cell = Any
"""A path, the bytes of a file, a dict with "path" and "bytes" as in ``datasets``, or nested lists of numbers."""


def file_of(cell: Cell, root: Path) -> Path | bytes:
    """Returns the file of a cell: its path, relative to ``root``, or its content."""
    if isinstance(cell, dict):
        return cell["bytes"] if cell.get("bytes") is not None else root / str(cell.get("path"))
    return cell if isinstance(cell, bytes) else root / str(cell)


def audio_rate_and_seconds(cell: Cell, root: Path, who: str) -> tuple[int, float]:
    """Returns the sample rate and duration of a recording."""
    from ..media_files import load_audio

    values, rate = load_audio(file_of(cell, root), who=who)
    return rate, len(values) / rate


def read_spectrogram(cell: Cell, root: Path, who: str, *, rate: int, seconds: float, bands: int) -> Tensor:
    """Returns the log-mel spectrogram (frame, band) of the first ``seconds`` of a recording."""
    from ..media_files import read_audio

    values = read_audio(file_of(cell, root), rate, who=who)[: max(1, round(seconds * rate))]
    return log_mel_frames(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)), rate, bands=bands)


def read_image(cell: Cell, root: Path, who: str, *, size: int) -> Tensor:
    """Returns an image (3, size, size) in [0, 1]: center crop to a square, then resized."""
    from PIL import ImageOps

    from ..media_files import load_image

    file = file_of(cell, root)
    if isinstance(file, Path) and file.suffix.lower() == ".npy":
        image = _array_image(load_array(file, root, who), who)
    else:
        image = load_image(file, who=who)
    return _pixels(ImageOps.fit(image, (size, size)))


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 255


def _array_image(values: np.ndarray, who: str) -> Any:
    from PIL import Image

    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3):
        raise DataError(who, expected="an image (height, width, 1 or 3)", got=f"shape {values.shape}")
    if values.dtype != np.uint8:
        if values.size and (values.min() < 0 or values.max() > 1):
            raise DataError(who, expected="pixels as uint8, or floating in [0, 1]", got=f"{values.dtype} beyond [0, 1]")
        values = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    return Image.fromarray(np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values)


def load_array(cell: Cell, root: Path, who: str) -> np.ndarray:
    """Returns the array of a .npy file or of nested lists; object arrays, which contain code, are refused."""
    try:
        if isinstance(cell, (list, np.ndarray)):
            return np.asarray(cell, dtype=np.float64 if isinstance(cell, list) else None)
        file = file_of(cell, root)
        return np.load(io.BytesIO(file) if isinstance(file, bytes) else file, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(who, expected="an array in a .npy file", got=f"no file '{error.filename}'") from error
    except (OSError, ValueError, EOFError, TypeError) as error:
        got = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
        name = "" if isinstance(cell, (list, np.ndarray)) else f" '{cell}'"
        raise DataError(
            f"{who}{name}", expected="an array of numbers in a .npy file", got=got,
            fix="Write it with numpy.save(path, array), without objects.",
        ) from error  # fmt: skip


def read_numbers(cell: Cell, root: Path, who: str, *, ndim: int) -> Tensor:
    """Returns an array of numbers with 1 (feature,) or 2 (time, feature) dimensions; (time,) becomes (time, 1)."""
    values = load_array(cell, root, who)
    if ndim == 2 and values.ndim == 1:
        values = values[:, None]
    if values.ndim != ndim or not values.size or not np.issubdtype(values.dtype, np.number):
        expected = "(feature,)" if ndim == 1 else "(time, feature)"
        raise DataError(who, expected=f"numbers of shape {expected}", got=f"{values.dtype} of shape {values.shape}")
    if np.iscomplexobj(values) or not np.isfinite(values).all():
        bad = "complex numbers" if np.iscomplexobj(values) else f"NaN or infinity in {(~np.isfinite(values)).sum()}"
        raise DataError(
            who, expected="finite real numbers", got=bad, fix="Leave the cell empty if the modality is missing."
        )
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def read_channels(cell: Cell, root: Path, who: str) -> Tensor:
    """Returns an array of an image (channel, height, width) or of frames (frame, channel, height, width).

    The file contains (height, width), (height, width, channel) or (frame, height, width, channel).
    """
    values = load_array(cell, root, who)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim not in (3, 4) or not values.size or values.dtype.kind not in "fiub":
        raise DataError(
            who, expected="numbers of shape (height, width), (height, width, channel) or (frame, height, width, "
                          "channel)",
            got=f"{values.dtype} of shape {values.shape}",
        )  # fmt: skip
    if not np.isfinite(values).all():
        raise DataError(
            who, expected="finite numbers", got=f"NaN or infinity in {(~np.isfinite(values)).sum()}",
            fix="Leave the cell empty if the modality is missing.",
        )  # fmt: skip
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, -3), dtype=np.float32))


def read_frames(cell: Cell, root: Path, who: str, *, frames: int, size: int) -> Tensor:
    """Returns (frames, 3, size, size) equally spaced frames of a video, a folder of images or an array."""
    from PIL import ImageOps

    from ..media_files import load_image

    file = file_of(cell, root)
    if isinstance(file, Path) and file.is_dir():
        files = sorted(path for path in file.iterdir() if path.suffix.lower() in EXTENSIONS["image"])
        load: Callable[[int], Any] = lambda index: load_image(files[index], who=who)  # noqa: E731
        count = len(files)
    elif isinstance(file, Path) and file.suffix.lower() == ".npy":
        array = load_array(file, root, who)
        load, count = lambda index: _array_image(array[index], who), len(array)
    else:
        load, count = _video(file, who)
    if not count:
        raise DataError(who, expected="at least one frame", got=f"none in '{cell}'")
    chosen = np.linspace(0, count - 1, frames).round().astype(int)
    return torch.stack([_pixels(ImageOps.fit(load(int(index)), (size, size))) for index in chosen])


def _video(file: Path | bytes, who: str) -> tuple[Callable[[int], Any], int]:
    from PIL import Image

    if isinstance(file, Path) and not file.is_file():
        raise DataError(who, expected="a video", got=f"no file '{file}'")
    if not (len(file) if isinstance(file, bytes) else file.stat().st_size):
        raise DataError(who, expected="a video", got="an empty file")
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError(
            who, expected="torchcodec with FFmpeg, which decodes videos", got="none on this computer",
            fix="Install FFmpeg and pip install 'equipoise[av]' in a version for this torch (python -c 'import "
            "torchcodec' names the missing library), or extract the frames to a folder of images per video.",
        ) from error  # fmt: skip
    try:
        decoder = VideoDecoder(file if isinstance(file, bytes) else str(file))
        frames = len(decoder)
    except (RuntimeError, ValueError) as error:
        raise DataError(who, expected="a complete video", got=_decoding_error(error)) from error

    def load(index: int) -> Image.Image:
        try:
            return Image.fromarray(decoder[index].permute(1, 2, 0).numpy())
        except (RuntimeError, IndexError) as error:
            raise DataError(
                who, expected="a complete video", got=f"frame {index} of {frames}: {_decoding_error(error)}",
                fix="Is the file truncated?",
            ) from error  # fmt: skip

    return load, frames


def _decoding_error(error: Exception) -> str:
    """Returns the message of torchcodec without the place in its source."""
    text = re.sub(r"^.*?\.cpp:\d+, ", "", " ".join(str(error).split()))
    if "best video stream is unknown" in text:
        return "no video stream"
    if text.startswith("Could not open input file"):
        return "a file of another kind, or a truncated one"
    return text[:160].rstrip(". ") or type(error).__name__
