"""Clips with frames and optical flow: what the layouts of UCF-101 and HMDB51 have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from .cremad import folder_images
from .frame_arrays import VIDEOS, decode_frames, middle_frames, read_frames, require_torchcodec
from .published_layout import Layout, Option, RawSample, Settings
from .raw_folder import Place, RawFolder

CLIPS = {
    "rgb": Place(("rgb", "frames", "jpegs_256"), "{clip}/frame_00001.jpg ...", required=False),
    "flow_u": Place(("flow_u", "flow_x", "tvl1_flow/u", "u"), "{clip}/frame000001.jpg ...", required=False),
    "flow_v": Place(("flow_v", "flow_y", "tvl1_flow/v", "v"), "{clip}/frame000001.jpg ...", required=False),
    "video": Place(
        ("video", "videos", "UCF-101", "hmdb51", "hmdb51_org"), "{class}/{clip}.avi, if rgb is missing", required=False
    ),
    "flow_video": Place(
        ("flow", "flow_video"), "{class}/{clip}_flow_x.mp4 and _flow_y.mp4, if flow_u is missing", required=False
    ),
}
"""Places of the frames; of each pair of images and videos one is needed."""


class RGBFlowClips(Layout):
    """Base class of layouts of clips with RGB frames and optical flow of two channels, horizontal and vertical.

    Frames are taken from the middle of equal segments of a clip, in training as in the test.
    """

    groups = "source video"
    columns = {"rgb": "frames", "flow": "array"}  # noqa: RUF012
    options = {  # noqa: RUF012
        "frames": Option(3, None, "frames of each clip, of RGB as of flow"),
        "size": Option(224, None, "height and width of the frames"),
        "fold": Option(1, (1, 2, 3), "number of the published split"),
    }

    def clip_files(self, raw: RawFolder, clips: dict[str, str]) -> dict[str, dict[str, list[str]]]:
        """Returns clip -> files, for clips of {name: class}.

        Raises:
            DataError: there are neither images nor videos. ConfigError: there are only videos, and no torchcodec.
        """
        rgb, u, v = raw.find("rgb"), raw.find("flow_u"), raw.find("flow_v")
        if (u is None) != (v is None):
            raise raw.missing("flow_u" if u is None else "flow_v")
        video = raw.require("video") if rgb is None and raw.find("video") else None
        flow = raw.require("flow_video") if u is None and raw.find("flow_video") else None
        for images, videos, name in ((rgb, video, "rgb"), (u, flow, "flow_u")):
            if images is None and videos is None:
                raise raw.missing(name)
            if images is None:
                require_torchcodec(f"data prepare {self.name}", f"{name}/{{clip}}/*.jpg")
        found: dict[str, dict[str, list[str]]] = {}
        for clip, label in clips.items():
            files = {"rgb": [_place(rgb, clip, label)]} if rgb else {"rgb_video": _videos(video, clip, label)}
            if u and v:
                files |= {"flow": [_place(u, clip, label), _place(v, clip, label)]}
            else:
                files |= {"flow_video": [p for axis in "xy" for p in _videos(flow, f"{clip}_flow_{axis}", label)]}
            found[clip] = files
        return found

    def convert(self, sample: RawSample, settings: Settings) -> dict[str, Any]:
        return {"rgb": self._rgb(sample, settings), "flow": self._flow(sample, settings)}

    def _rgb(self, sample: RawSample, settings: Settings) -> np.ndarray:
        if "rgb" in sample.files:
            return _chosen(Path(sample.files["rgb"][0]), settings, gray=False)
        videos = sample.files["rgb_video"]
        if not videos:
            raise DataError(f"video of '{sample.id}'", expected="a video", got="no such file")
        return _decoded(Path(videos[0]), settings, gray=False)

    def _flow(self, sample: RawSample, settings: Settings) -> np.ndarray:
        if "flow" in sample.files:
            parts = [_chosen(Path(folder), settings, gray=True) for folder in sample.files["flow"]]
        else:
            videos = sample.files["flow_video"]
            if len(videos) != 2:
                raise DataError(f"flow of '{sample.id}'", expected="two videos of optical flow", got=f"{len(videos)}")
            parts = [_decoded(Path(video), settings, gray=True) for video in videos]
        return np.concatenate(parts, axis=-1)


def _chosen(folder: Path, settings: Settings, *, gray: bool) -> np.ndarray:
    paths = folder_images(folder, settings.raw)
    places = middle_frames(len(paths), settings.options["frames"])
    return read_frames([paths[i] for i in places], settings.options["size"], gray=gray)


def _decoded(video: Path, settings: Settings, *, gray: bool) -> np.ndarray:
    count, size = settings.options["frames"], settings.options["size"]
    return decode_frames(video, lambda n: middle_frames(n, count), size, gray=gray)


def _place(folder: Path, clip: str, label: str) -> str:
    """Returns the folder of a clip, directly in the folder or in one of its class."""
    inner = folder / label / clip
    return str(inner if not (folder / clip).exists() and inner.exists() else folder / clip)


def _videos(folder: Path | None, stem: str, label: str) -> list[str]:
    if folder is None:
        return []
    paths = (directory / f"{stem}{suffix}" for directory in (folder / label, folder) for suffix in VIDEOS)
    return [str(path) for path in paths if path.exists()][:1]
