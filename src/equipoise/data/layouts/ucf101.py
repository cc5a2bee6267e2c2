"""Layout of UCF-101: RGB frames and optical flow, with the published lists of clips."""

from __future__ import annotations

import re
from typing import Any

from ...errors import DataError
from . import raw_folder
from .published_layout import RawSample, Scan, Settings
from .raw_folder import Place
from .rgb_flow_clips import CLIPS, RGBFlowClips
from .split_assignment import hold_out_validation

CLIP = re.compile(r"v_([A-Za-z]+)_(g\d+)_c\d+")
FOLDERS = ("", "ucfTrainTestlist/", "splits/", "ucf101_splits/")


class UCF101(RGBFlowClips):
    """UCF-101: 13,320 clips of 101 actions, cut from 25 source videos per action.

    Class numbers follow the sorted names. The published splits have no source video in common; validation has whole
    source videos of the training list, a tenth of the clips of every class.
    """

    name = "ucf101"
    title = "UCF-101"
    source = "https://www.crcv.ucf.edu/data/UCF101.php"
    license = "none stated; the clips belong to their uploaders"
    places = {  # noqa: RUF012
        **CLIPS,
        **{
            f"{split}{fold}": Place(
                tuple(f"{folder}{split}list{fold:02d}.txt" for folder in FOLDERS),
                "lines 'Class/v_Class_g01_c01.avi'", required=False,
            )
            for split in ("train", "test")
            for fold in (1, 2, 3)
        },
    }  # fmt: skip
    published = {"train": 9537, "test": 3783}  # noqa: RUF012

    def scan(self, settings: Settings) -> Scan:
        raw, fold = settings.raw, settings.options["fold"]
        places, rows = [], []
        for split in ("train", "test"):
            path = raw.require(f"{split}{fold}")
            for number, values in raw_folder.read_list(path, 1):
                clip = values[0].replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".avi")
                parts = CLIP.fullmatch(clip)
                if parts is None:
                    raise DataError(
                        f"list '{path}', line {number}",
                        expected="a clip as v_Class_g01_c01.avi",
                        got=f"'{values[0][:60]}'",
                    )
                places.append((clip, f"line {number} of {path.name}"))
                rows.append((clip, split, parts[1], f"{parts[1]}_{parts[2]}"))
        raw_folder.check_unique(places)
        classes = sorted({label for _, _, label, _ in rows})
        files: dict[str, Any] = self.clip_files(raw, {clip: label for clip, _, label, _ in rows})
        samples = [
            RawSample(clip, split, classes.index(label), group, label, files[clip])
            for clip, split, label, group in rows
        ]
        return Scan(hold_out_validation(samples, by_group=True), classes=classes)
