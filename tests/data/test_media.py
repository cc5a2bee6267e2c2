"""Loading of images and sounds: orientation, bit depth, transparency, sample rates, and rejected files."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import equipoise
from equipoise.data import media_files
from equipoise.data.image_augmentation import load_square_image
from equipoise.data.media_files import load_audio, load_image, read_audio
from equipoise.data.sets.spoken_digits_files import read_wav
from equipoise.errors import DataError

RAMP = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)


def png_bytes(width, height, depth, color, rows, extra=b""):
    """A PNG file, byte by byte, of what Pillow does not write."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_only_media_files_opens_images_and_sounds():
    package = Path(equipoise.__file__).parent
    result = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"Image\.open|import soundfile|torchaudio|librosa|exif_transpose|import wave\b", path.read_text())
    ]
    assert result == ["data/media_files.py"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path, kind, orientation):
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:16, :16] = 255
    # How each orientation is stored: the inverse of what shows it upright.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **({"quality": 95} if kind == "jpg" else {}))
    for image in (path, Image.open(path)):
        result = load_image(image)
        assert (result.mode, result.size) == ("RGB", (32, 48))
        # Compression blurs the edges.
        assert np.abs(np.asarray(result)[4:12, 4:12] - 255.0).max() < 20
        assert np.asarray(result)[20:, 20:].max() < 20
    assert load_square_image(path, 24)[2, 6].min() > 200


def test_unreadable_exif_is_ignored(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_image(tmp_path / "a.jpg").size == (40, 20)


def test_16_bit_images_are_scaled(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    Image.fromarray(RAMP).save(tmp_path / "deep.tif")
    (tmp_path / "deep.pgm").write_bytes(b"P5 20 20 65535\n" + RAMP.astype(">u2").tobytes())
    expected = np.round(RAMP / 257)
    for image in (tmp_path / "deep.png", tmp_path / "deep.tif", tmp_path / "deep.pgm", Image.fromarray(RAMP)):
        result = np.asarray(load_image(image))
        assert np.array_equal(result, np.repeat(expected[..., None], 3, axis=2))
    assert load_square_image(tmp_path / "deep.png", 20)[0, 0, 0] == 0


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_images_with_several_channels(tmp_path, channels):
    values = np.stack([RAMP] * channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png_bytes(20, 20, 16, {2: 4, 3: 2, 4: 6}[channels], rows))
    result = np.asarray(load_image(tmp_path / "a.png")).astype(float)
    assert np.abs(result - (RAMP / 257)[..., None]).max() <= 1


def test_16_bit_gray_with_transparent_value(tmp_path):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.array([[0, 257, 514, 65535]] * 2))
    extra = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 257) + struct.pack(">I", zlib.crc32(b"tRNS\x01\x01"))
    (tmp_path / "a.png").write_bytes(png_bytes(4, 2, 16, 0, rows, extra))
    assert np.asarray(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 2, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparency_becomes_white(tmp_path, mode):
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    if mode in ("La", "LA"):
        clear = clear.convert("LA")
    image = clear.convert(mode)
    assert np.asarray(load_image(image)).min() == 255
    half = Image.new("RGBA", (20, 20), (255, 0, 0, 128))
    assert load_image(half).getpixel((3, 3)) == (255, 127, 127)


def test_transparent_palette_and_file_colors(tmp_path):
    palette = Image.new("P", (9, 9), 3)
    palette.putpalette([0, 0, 0, 10, 20, 30, 0, 0, 0, 200, 0, 0])
    palette.paste(1, (0, 0, 9, 3))
    for name, options in (("a.gif", {}), ("a.png", {}), ("b.png", {"transparency": bytes([255, 255, 255, 0])})):
        palette.save(tmp_path / name, **({"transparency": 3} | options))
        result = load_image(tmp_path / name)
        assert (result.getpixel((1, 1)), result.getpixel((5, 8))) == ((10, 20, 30), (255, 255, 255))
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "c.png", transparency=(1, 2, 3))
    assert load_image(tmp_path / "c.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_modes_without_transparency(mode):
    assert load_image(Image.new("RGB", (16, 16), "white").convert(mode)).getpixel((2, 2)) == (255, 255, 255)
    assert load_image(Image.new("RGB", (16, 16), "black").convert(mode)).getpixel((2, 2)) == (0, 0, 0)


def test_cmyk_file(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    frames[0].save(
        tmp_path / f"a.{kind}",
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "webp" else {}),
    )
    assert load_image(tmp_path / f"a.{kind}").getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, -1])
def test_truncated_images(tmp_path, kind, kept):
    full = tmp_path / f"whole.{kind}"
    Image.effect_noise((64, 48), 90).convert("RGB").save(full)
    assert load_image(full).size == (64, 48)
    content = full.read_bytes()
    size = len(content) - 1 if kept == -1 else int(kept * len(content))
    if kind == "jpg" and kept == -1:
        # All of the image is there; the end of its end is not.
        size -= 200
    (tmp_path / f"cut.{kind}").write_bytes(content[:size])
    with pytest.raises(DataError, match=rf"image '.*cut\.{kind}': expected (a complete|an) image"):
        load_image(tmp_path / f"cut.{kind}")
    with pytest.raises(DataError):
        load_square_image(tmp_path / f"cut.{kind}", 16)


def test_truncated_animation(tmp_path):
    frames = [Image.effect_noise((32, 32), 90) for _ in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[: int(0.8 * len(content))])
    with pytest.raises(DataError, match=r"complete image.*its end is missing\. Is the file truncated"):
        load_image(tmp_path / "a.gif")


def test_decompression_bombs(tmp_path, monkeypatch):
    rows = zlib.compress(bytes(1000))
    # 30,000 x 30,000 pixels in some hundred bytes: refused before they are unpacked.
    (tmp_path / "bomb.png").write_bytes(png_bytes(30_000, 30_000, 8, 0, rows))
    # Between Pillow's warning and its error.
    (tmp_path / "large.png").write_bytes(png_bytes(10_000, 10_000, 8, 0, rows))
    for name in ("bomb.png", "large.png"):
        with pytest.raises(DataError, match=rf"{name}': expected an image of at most 89,478,485 pixels, got "):
            load_image(tmp_path / name)
    # This limit also holds if Pillow's own limit is switched off.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match="10000 x 10000 pixels, a decompression bomb"):
        load_image(tmp_path / "large.png")


def test_not_an_image_raises(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    for name, message in (
        ("none.png", "expected an image, got no such file"),
        ("empty.png", "expected an image, got an empty file"),
        ("", "expected an image, got no regular file"),
        ("text.png", "expected an image, as PNG, JPEG or WebP, got a file of another kind"),
        ("a.eps", "got a file of another kind"),
    ):
        with pytest.raises(DataError, match=message):
            load_image(tmp_path / name)
    with pytest.raises(DataError, match="image: expected an image, its path or its content, got int"):
        load_image(7)
    for mode in ("I", "F"):
        with pytest.raises(DataError, match=rf"got mode {mode}, of unknown range\. Convert it to 8-bit RGB"):
            load_image(Image.new(mode, (9, 9)))


def tone(rate, seconds=0.5, hertz=100.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_sample_formats_and_channels(tmp_path, subtype, channels):
    left = 0.5 * tone(16000)
    values = np.stack([left * (1 if index == 0 else 0.5) for index in range(channels)], axis=1)
    soundfile.write(tmp_path / "a.wav", values, 16000, subtype=subtype)
    result = read_audio(tmp_path / "a.wav", 16000)
    assert (result.shape, result.dtype) == ((8000,), np.float32)
    assert np.abs(result - values.mean(axis=1)).max() < (0.02 if subtype in ("PCM_U8", "ULAW") else 1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 12345, 22050, 44100, 48000, 96000])
def test_sampling_rates_are_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.flac", tone(rate), rate)
    result = read_audio(tmp_path / "a.flac", 16000)
    assert abs(len(result) - 8000) <= 1
    assert np.abs(result - tone(16000, len(result) / 16000 + 1e-9))[500:-500].max() < 0.01


@pytest.mark.parametrize("kind", ["WAV", "RF64", "AIFF", "FLAC", "OGG", "WAVEX"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.999])
def test_truncated_audio(tmp_path, kind, kept):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(size=16000) * 0.1, 16000, format=kind)
    content = file.getvalue()
    (tmp_path / "whole").write_bytes(content)
    assert len(read_audio(tmp_path / "whole", 16000)) == 16000
    (tmp_path / "cut").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"audio '.*cut': expected .*(truncated|complete)"):
        read_audio(tmp_path / "cut", 16000)


def test_not_audio_raises(tmp_path, monkeypatch):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_bytes(b"nothing")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", np.zeros(8), 50)
    soundfile.write(tmp_path / "fast.wav", np.zeros(8), 2_000_003)
    for name, message in (
        ("missing.wav", "audio '.*missing.wav': expected a sound, got no such file"),
        ("empty.wav", "expected a sound, got an empty file"),
        ("text.wav", "expected a sound, as WAV or FLAC"),
        ("none.wav", "expected at least one sample, got an empty recording"),
        ("nan.wav", "expected finite samples, got NaN or infinity in 1"),
        ("slow.wav", "expected a rate from 1000 to 384000 Hz, got 50 Hz"),
        ("fast.wav", "got 2000003 Hz"),
    ):
        with pytest.raises(DataError, match=message):
            load_audio(tmp_path / name)
        with pytest.raises(DataError, match=message):
            read_audio(tmp_path / name, 16000)
    soundfile.write(tmp_path / "a.flac", np.zeros((4000, 2)), 8000)
    monkeypatch.setattr(media_files, "MAX_SAMPLES", 7999)
    with pytest.raises(DataError, match="expected a sound of at most 7,999 samples, got 8,000"):
        read_audio(tmp_path / "a.flac", 8000)
    soundfile.write(tmp_path / "b.flac", np.zeros(4000), 8000)
    with pytest.raises(DataError, match="expected a sound of at most 7,999 samples at 16000 Hz, got 4,000 at 8000 Hz"):
        read_audio(tmp_path / "b.flac", 16000)


def test_audio_arrays():
    values = np.array([0.0, 0.5])
    assert read_audio(values, 16000) is values
    for wrong in (np.zeros((2, 3)), np.zeros(0), np.zeros(3, dtype=np.int16)):
        with pytest.raises(DataError, match=r"audio: expected a floating array \(sample,\) in \[-1, 1\], got"):
            read_audio(wrong, 16000)
    with pytest.raises(DataError, match="audio: expected finite samples, got NaN or infinity in 1"):
        read_audio(np.array([0.0, np.inf]), 16000)


def test_look_and_data_sets_read_files_equally(tmp_path):
    from equipoise.inspection import prompt_inputs

    assert prompt_inputs.load_image is load_image
    assert prompt_inputs.read_audio is read_audio
    soundfile.write(tmp_path / "a.wav", np.zeros(8000, "float32"), 8000)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:4000])
    for read in (lambda path: read_audio(path, 8000), read_wav):
        with pytest.raises(DataError, match="bytes in the chunk 'data', as its header says, got"):
            read(tmp_path / "cut.wav")
