"""Frames of clips as arrays (frame, height, width, channel), from folders of images or from videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ...errors import ConfigError, DataError
from ..media_files import load_image

IMAGES = (".jpg", ".jpeg", ".png")
VIDEOS = (".avi", ".mp4", ".flv", ".mkv", ".webm")
MOST_FRAMES = 100_000


def middle_frames(available: int, count: int) -> list[int]:
    """Returns the positions of frames in the middle of equal segments, as the test rule of published loaders does.

    ::

        segment = floor(n / k),   t_i = i segment + max(floor(segment / 2), 1),  i = 0 .. k - 1     counted from 1

    Example:
        >>> middle_frames(9, 3), middle_frames(6, 3), middle_frames(2, 3), middle_frames(7, 1)
        ([0, 3, 6], [0, 2, 4], [0, 0, 0], [2])
    """
    segment = available // count
    return [min(i * segment + max(segment // 2, 1), available) - 1 for i in range(count)]


def read_frames(files: Sequence[Path], size: int, *, gray: bool = False) -> UInt8[np.ndarray, "frame height width c"]:
    """Reads images and resizes them to a square, bilinearly and without keeping the aspect ratio.

    Raises:
        DataError: a file is missing or damaged.
    """
    from PIL import Image

    frames = []
    for file in files:
        image = load_image(file, who="frame").convert("L" if gray else "RGB")
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        frames.append(pixels[..., None] if gray else pixels)
    return np.stack(frames)


def require_torchcodec(who: str, instead: str) -> Any:
    """Returns torchcodec's video decoder.

    Args:
        who: start of the error message.
        instead: folder of extracted frames that would be read without it.

    Raises:
        ConfigError: torchcodec or FFmpeg is not installed.
    """
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    # Without FFmpeg's libraries, torchcodec raises a RuntimeError when it is imported.
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            who, expected="torchcodec and FFmpeg, which decode videos", got="none installed",
            fix=f"Install FFmpeg and torchcodec, or extract the frames to {instead}.",
        ) from error  # fmt: skip
    return VideoDecoder


def decode_frames(
    video: Path, choose: Callable[[int], list[int]], size: int, *, gray: bool = False, instead: str = "images"
) -> UInt8[np.ndarray, "frame height width c"]:
    """Decodes frames of a video with torchcodec.

    Args:
        video: the file.
        choose: number of frames -> positions to decode.
        size: height and width of the result.
        gray: one channel instead of three.
        instead: folder of extracted frames, for the error message.

    Raises:
        ConfigError: torchcodec or FFmpeg is not installed. DataError: the video is damaged or has no frames.
    """
    from PIL import Image

    decoder_class = require_torchcodec("videos", instead)
    if not video.is_file() or not video.stat().st_size:
        raise DataError(
            f"video '{video}'", expected="a video", got="an empty file" if video.is_file() else "no such file"
        )
    try:
        decoder = decoder_class(str(video))
        count = min(len(decoder), MOST_FRAMES)
        if count < 1:
            raise RuntimeError("no frames")
        pixels = decoder.get_frames_at(indices=choose(count)).data.permute(0, 2, 3, 1).numpy()
    # FFmpeg's errors arrive as several kinds.
    except Exception as error:
        text = " ".join(str(error).split())[:100]
        raise DataError(f"video '{video}'", expected="a complete video", got=text or type(error).__name__) from error
    frames = []
    for frame in pixels:
        image = Image.fromarray(frame).convert("L" if gray else "RGB")
        resized = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        frames.append(resized[..., None] if gray else resized)
    return np.stack(frames)
