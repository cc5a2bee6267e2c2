"""Loads image and audio files; rejects truncated and oversized ones."""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import DataError

MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image, as in Pillow: a small file can decompress to any size."""
MAX_SAMPLES = 2**28
"""Largest number of audio samples over all channels, before and after resampling: 1 GiB in float32."""
RATES = (1_000, 384_000)
"""Range of sample rates in Hz; the resampling filter grows with the rate."""
PROGRAMS = ("EPS", "WMF")
"""Formats for which Pillow would start an external interpreter."""
SIXTEEN = ("PNG", "PPM")
"""Formats whose 16-bit values Pillow returns as 32-bit."""
CHUNKS: dict[bytes, tuple[Literal["little", "big"], bytes]] = {
    b"RIFF": ("little", b"data"),
    b"RF64": ("little", b"data"),
    b"RIFX": ("big", b"data"),
    b"FORM": ("big", b"SSND"),
}
"""Magic bytes of chunked audio files -> byte order, and the chunk with the samples."""


def load_image(image: str | Path | bytes | Image.Image, *, who: str = "image") -> Image.Image:
    """Loads an image in RGB with 8 bits per channel.

    Applies the EXIF orientation, divides 16-bit gray values by 257, and blends transparent areas with white. Only the
    first frame of an animation is loaded.

    Args:
        image: a file, its content, or a Pillow image.
        who: start of the error messages.

    Raises:
        DataError: the file is missing, empty, truncated or not an image; more than ``MAX_PIXELS`` pixels; values of
            unknown range, such as 32-bit integers and floats.

    Example:
        >>> load_image(Image.new("LA", (2, 2))).getpixel((0, 0))
        (255, 255, 255)
    """
    content = b""
    if not isinstance(image, Image.Image):
        who = f"{who} '{image}'" if isinstance(image, (str, os.PathLike)) else who
        content = _content(image, who, "an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("error", message="Truncated File Read")
            opened = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(content))
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels, a decompression bomb")
            if opened.format in PROGRAMS:
                raise UnidentifiedImageError(opened.format)
            opened.load()
            _require_end(opened.format, content)
            return _on_white(_eight_bits(_upright(opened), opened.format, who))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            who, expected="an image, as PNG, JPEG or WebP", got="a file of another kind", fix="Is it complete?"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(who, expected=f"an image of at most {MAX_PIXELS:,} pixels", got=_error_text(error)) from error
    # Pillow's decoders raise many kinds of errors on invalid content.
    except Exception as error:
        raise DataError(
            who, expected="a complete image, as PNG, JPEG or WebP", got=_error_text(error), fix="Is the file truncated?"
        ) from error


def read_audio(
    sound: str | Path | bytes | np.ndarray | Tensor, rate: int, *, who: str = "audio"
) -> Float[np.ndarray, " sample"]:
    """Loads a sound as mono (mean of the channels), resampled to the given rate.

    Args:
        sound: a file of any rate, its content, or an array or tensor (sample,) of this rate.
        rate: sample rate of the result, in Hz.
        who: start of the error messages.

    Raises:
        DataError: as ``load_audio``; the array is not finite floating (sample,).
    """
    if isinstance(sound, Tensor):
        values = sound.detach().cpu()
        # NumPy has no bfloat16.
        sound = (values.float() if values.is_floating_point() else values).numpy()
    if isinstance(sound, np.ndarray):
        if sound.ndim != 1 or not np.issubdtype(sound.dtype, np.floating) or not len(sound):
            raise DataError(
                who, expected="a floating array (sample,) in [-1, 1]", got=f"{sound.dtype} of shape {sound.shape}",
                fix="Average the channels; divide integers by their largest value.",
            )  # fmt: skip
        _require_finite(sound, who)
        return sound
    from scipy.signal import resample_poly

    channels, file_rate = load_audio(sound, who=who)
    values = channels.mean(axis=1)
    if file_rate == rate:
        return values
    if len(values) * rate > MAX_SAMPLES * file_rate:
        raise DataError(
            who, expected=f"a sound of at most {MAX_SAMPLES:,} samples at {rate} Hz",
            got=f"{len(values):,} at {file_rate} Hz",
        )  # fmt: skip
    divisor = math.gcd(file_rate, rate)
    return resample_poly(values, rate // divisor, file_rate // divisor).astype(np.float32)


def load_audio(path: str | Path | bytes, *, who: str = "audio") -> tuple[Float[np.ndarray, "sample channel"], int]:
    """Loads the samples of an audio file in float32, and its rate in Hz; integers are scaled to [-1, 1).

    Raises:
        DataError: the file is missing, empty, truncated or not audio; no samples, NaN or infinity; more than
            ``MAX_SAMPLES`` samples; a rate outside ``RATES``.
    """
    import soundfile

    who = f"{who} '{path}'" if isinstance(path, (str, os.PathLike)) else who
    content = _content(path, who, "a sound")
    _require_chunks(content, who)
    _require_last_page(content, who)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            length, rate = file.frames, file.samplerate
            if not RATES[0] <= rate <= RATES[1]:
                raise DataError(who, expected=f"a rate from {RATES[0]} to {RATES[1]} Hz", got=f"{rate} Hz")
            if length * file.channels > MAX_SAMPLES:
                raise DataError(
                    who, expected=f"a sound of at most {MAX_SAMPLES:,} samples", got=f"{length * file.channels:,}"
                )
            values = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise DataError(
            who, expected="a sound, as WAV or FLAC", got=_error_text(error), fix="Is it complete?"
        ) from error
    if not len(values):
        raise DataError(who, expected="at least one sample", got="an empty recording", fix="Fetch the file again.")
    if len(values) < length:
        raise _truncated(who, f"{length} samples, as its header says", len(values))
    _require_finite(values, who)
    return values, rate


def _content(path: str | Path | bytes, who: str, kind: str) -> bytes:
    if isinstance(path, bytes):
        if not path:
            raise DataError(who, expected=kind, got="an empty file")
        return path
    if not isinstance(path, (str, os.PathLike)):
        raise DataError(who, expected=f"{kind}, its path or its content", got=type(path).__name__)
    try:
        content = Path(path).read_bytes() if Path(path).is_file() or not Path(path).exists() else None
    except FileNotFoundError as error:
        raise DataError(who, expected=kind, got="no such file") from error
    except (OSError, TypeError, ValueError) as error:
        raise DataError(who, expected=kind, got=_error_text(error)) from error
    if not content:
        raise DataError(who, expected=kind, got="an empty file" if content == b"" else "no regular file")
    return content


def _require_end(kind: str | None, content: bytes) -> None:
    """Raises OSError if the end of a file is missing although Pillow could decode its image or first frame."""
    cut = {"PNG": b"IEND\xaeB`\x82" not in content, "GIF": not content.rstrip(b"\0\r\n ").endswith(b";")}
    if content and cut.get(kind or "", False):
        raise OSError("image file is truncated: its end is missing")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # The EXIF data is damaged, the image is not.
    except Exception:
        return image


def _eight_bits(image: Image.Image, kind: str | None, who: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in SIXTEEN):
        values = np.asarray(image).astype(np.int64)
        gray = Image.fromarray(((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
        if isinstance(image.info.get("transparency"), int):
            gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
        return gray
    if image.mode in ("I", "F"):
        raise DataError(
            who, expected="an image of 8 or 16 bits a color", got=f"mode {image.mode}, of unknown range",
            fix="Convert it to 8-bit RGB first.",
        )  # fmt: skip
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGB", "HSV", "LAB", "YCbCr", "CMYK") and "transparency" not in image.info:
        return image.convert("RGB")
    colors = image.convert("LA") if image.mode == "La" else image
    colors = colors.convert("RGBA")
    white = Image.new("RGBA", colors.size, "white")
    white.alpha_composite(colors)
    return white.convert("RGB")


def _require_chunks(content: bytes, who: str) -> None:
    """Raises DataError if a chunk is shorter than its header states; libsndfile would return the remaining samples."""
    if content[:4] not in CHUNKS:
        return
    order, data = CHUNKS[content[:4]]
    at, long = 12, None
    while at + 8 <= len(content):
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], order)
        held = len(content) - at - 8
        if name == b"ds64":
            long = int.from_bytes(content[at + 16 : at + 24], order)
        if name == data and long is not None and size == 0xFFFFFFFF:
            size = long
        if size > held:
            raise _truncated(
                who, f"{size} bytes in the chunk '{name.decode('ascii', 'replace')}', as its header says", held
            )
        if name == data:
            return
        at += 8 + size + size % 2
    raise DataError(
        who, expected=f"a chunk '{data.decode()}'", got="none", fix="The file is truncated: fetch it again."
    )


def _require_last_page(content: bytes, who: str) -> None:
    """Raises DataError if the last page of an Ogg stream is truncated or not marked as the last."""
    if content[:4] != b"OggS":
        return
    at = content.rfind(b"OggS")
    table = content[at + 27 : at + 27 + content[at + 26]] if at + 27 <= len(content) else b""
    if not table or not content[at + 5] & 4 or at + 27 + len(table) + sum(table) > len(content):
        raise _truncated(who, "a last page", "none")


def _require_finite(values: np.ndarray, who: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(who, expected="finite samples", got=f"NaN or infinity in {int((~np.isfinite(values)).sum())}")


def _truncated(who: str, expected: str, got: object) -> DataError:
    return DataError(who, expected=expected, got=f"{got}", fix="The file is truncated: fetch it again.")


def _error_text(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
