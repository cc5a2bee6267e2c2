"""Videos: frames of files that FFmpeg makes, damaged ones, and a table with videos from check to batches."""

import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from equipoise.data.sets.manifest import ManifestDataset
from equipoise.data.sets.stream import StreamDataset
from equipoise.data.tables.cell_readers import read_frames
from equipoise.errors import DataError


def missing():
    """Returns what is missing to decode videos, or None."""
    if shutil.which("ffmpeg") is None:
        return "no ffmpeg program"
    try:
        import torchcodec.decoders  # noqa: F401
    except ImportError:
        return "no torchcodec"
    except (RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else repr(error)
        return f"torchcodec does not load with torch {torch.__version__} and this FFmpeg: {reason}"
    return None


REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"videos are not decoded: {REASON}")


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", "-y", *arguments], check=True)


def color(path, *colors, seconds=1, size="64x48", options=()):
    """Writes a video that shows each color for equally long."""
    inputs = [
        part for one in colors for part in ("-f", "lavfi", "-i", f"color={one}:size={size}:rate=10:duration={seconds}")
    ]
    joined = "".join(f"[{i}]" for i in range(len(colors)))
    ffmpeg(
        *inputs, "-filter_complex", f"{joined}concat=n={len(colors)}:v=1", "-pix_fmt", "yuv420p", *options, str(path)
    )


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm"])
def test_frames_are_equally_spaced(tmp_path, suffix):
    color(tmp_path / f"a.{suffix}", "red", "lime", "blue", options=() if suffix != "webm" else ("-c:v", "libvpx"))
    frames = read_frames(f"a.{suffix}", tmp_path, "video", frames=3, size=16)
    assert frames.shape == (3, 3, 16, 16)
    # First, middle and last frame.
    torch.testing.assert_close(frames.mean(dim=(2, 3)), torch.eye(3), atol=0.1, rtol=0)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert torch.equal(read_frames(content, tmp_path, "video", frames=3, size=16), frames)


def test_rotation_and_single_frames(tmp_path):
    color(tmp_path / "a.mp4", "red", size="128x48")
    ffmpeg("-i", str(tmp_path / "a.mp4"), "-c", "copy", "-metadata:s:v", "rotate=90", str(tmp_path / "r.mp4"))
    from torchcodec.decoders import VideoDecoder

    assert VideoDecoder(str(tmp_path / "r.mp4"))[0].shape == (3, 128, 48)
    color(tmp_path / "one.mp4", "red", options=("-frames:v", "1"))
    assert read_frames("one.mp4", tmp_path, "video", frames=4, size=8).shape == (4, 3, 8, 8)


def write_damaged(folder):
    color(folder / "whole.mp4", "red", "lime", "blue", "white", options=("-movflags", "faststart", "-g", "5"))
    content = (folder / "whole.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(content[: len(content) // 2])
    (folder / "header.mp4").write_bytes(content[:300])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", str(folder / "sound.mp4"))


FAULTS = {
    "half.mp4": "expected a complete video, got",
    "header.mp4": "expected a complete video, got",
    "empty.mp4": "expected a video, got an empty file",
    "text.mp4": "got a file of another kind, or a truncated one",
    "sound.mp4": "got no video stream",
    "none.mp4": "expected a video, got no file",
}


@pytest.mark.parametrize("name", FAULTS)
def test_damaged_videos(tmp_path, name):
    write_damaged(tmp_path)
    with pytest.raises(DataError, match=f"video, row 3: .*{FAULTS[name]}") as error:
        read_frames(name, tmp_path, "video, row 3", frames=4, size=8)
    assert ".cpp" not in str(error.value)


@pytest.mark.parametrize("kind", [ManifestDataset, StreamDataset])
def test_a_table_with_videos(tmp_path, kind):
    write_damaged(tmp_path)
    for i in range(20):
        color(tmp_path / f"{i}.mp4", "red" if i % 2 else "blue", seconds=0.3 + 0.1 * (i % 4))
    clips = [f"{i}.mp4" for i in range(20)]
    clips[3], clips[4] = None, "half.mp4"
    table = pd.DataFrame(
        {
            "clip": clips,
            "x": np.arange(20.0),
            "label": ["a", "a", "b", "b"] * 5,
            "split": ["train", "val", "train", "test"] * 5,
        }
    )
    table.to_csv(tmp_path / "clips.csv", index=False)
    data = kind(str(tmp_path / "clips.csv"), target="label")
    assert data.shapes["clip"] == (4, 3, 64, 64)
    assert list(data.check()) == [4]
    data = kind(str(tmp_path / "clips.csv"), target="label", skip=[4])
    batch = data.batch("train", torch.arange(len(data.train)), seed=0, epoch=0, train=False)
    assert batch["clip"].shape == (9, 4, 3, 64, 64)
    assert batch["clip"].isfinite().all()
    assert data.batch("test", torch.arange(5), seed=0, epoch=0, train=False)["mask"]["clip"].tolist() == [
        False,
        *[True] * 4,
    ]
