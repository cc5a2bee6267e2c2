"""Layout of HMDB51: RGB frames and optical flow, with the published lists and the known classes of MultiOOD."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import DataError
from . import raw_folder
from .published_layout import Option, RawSample, Scan, Settings
from .raw_folder import Place, RawFolder
from .rgb_flow_clips import CLIPS, RGBFlowClips
from .split_assignment import hold_out_validation

LIST = re.compile(r"(\w+)_test_split([123])\.txt")
SPLITS = {"1": "train", "2": "test", "0": ""}
NEAR = 25
"""Known classes of the near-OOD protocol: the first ones in alphabetical order."""
FAR = (
    "brush_hair", "cartwheel", "catch", "clap", "climb", "dive", "draw_sword", "dribble", "fall_floor", "fencing",
    "flic_flac", "golf", "handstand", "hit", "hug", "jump", "kick", "kick_ball", "kiss", "laugh", "pullup",
    "punch", "push", "pushup", "ride_bike", "shake_hands", "shoot_ball", "shoot_bow", "shoot_gun", "sit", "situp",
    "smile", "smoke", "somersault", "stand", "swing_baseball", "sword", "sword_exercise", "talk", "throw", "turn",
    "walk", "wave",
)  # fmt: skip
"""Known classes of the far-OOD protocol: those that UCF-101 does not share."""


class HMDB51(RGBFlowClips):
    """HMDB51: 6,766 clips of 51 actions from films and YouTube.

    Clips that a list marks with 0 are in neither split. With ``ood``, classes that are not known in MultiOOD's protocol
    are written to a manifest of their own, ood.csv, and the known classes are numbered from 0.
    """

    name = "hmdb51"
    title = "HMDB51"
    source = "https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database"
    license = "CC BY 4.0"
    places = {  # noqa: RUF012
        **CLIPS,
        "lists": Place(
            ("testTrainMulti_7030_splits", "splits", "test_train_splits"),
            "{class}_test_split1.txt with lines 'clip.avi 1' (1 training, 2 test, 0 neither)", required=False,
        ),
    }  # fmt: skip
    options = {  # noqa: RUF012
        **RGBFlowClips.options,
        "ood": Option("none", ("none", "near", "far"), "known classes of MultiOOD's protocol: all, first 25, or 43"),
    }
    published = {"train": 3570, "test": 1530}  # noqa: RUF012

    def scan(self, settings: Settings) -> Scan:
        raw, ood = settings.raw, settings.options["ood"]
        rows, places, unused = [], [], 0
        disjoint = settings.options["split"] == "disjoint"
        for path, label in _lists(raw, settings.options["fold"]):
            for number, values in raw_folder.read_list(path, 2):
                clip, mark = values[0].rsplit("/", 1)[-1].removesuffix(".avi"), values[1]
                if mark not in SPLITS:
                    raise DataError(f"list '{path}', line {number}", expected="0, 1 or 2", got=f"'{mark[:20]}'")
                places.append((clip, f"line {number} of {path.name}"))
                unused += mark == "0" and not disjoint
                if SPLITS[mark] or disjoint:
                    rows.append((clip, SPLITS[mark], label))
        raw_folder.check_unique(places)
        names = sorted({label for _, _, label in rows})
        classes = names[:NEAR] if ood == "near" else [name for name in names if name in FAR] if ood == "far" else names
        if not classes:
            raise DataError(f"data prepare {self.name} --ood {ood}", expected="known classes", got=f"only {names[:5]}")
        files: dict[str, Any] = self.clip_files(raw, {clip: label for clip, _, label in rows})
        samples = [
            RawSample(
                clip,
                split if label in classes else "ood",
                classes.index(label) if label in classes else -1,
                source_of(clip, label),
                label,
                files[clip],
            )
            for clip, split, label in rows
        ]
        notes = [f"{unused} clips are in neither split of the published lists."] if unused else []
        return Scan(hold_out_validation(samples, by_group=True), notes=notes, classes=classes)


def source_of(clip: str, label: str) -> str:
    """Returns the source video in the name of a clip.

    Example:
        >>> source_of("April_09_brush_hair_u_nm_np1_ba_goo_0", "brush_hair")
        'April_09'
    """
    source, separator, _ = clip.partition(f"_{label}_")
    return source if separator else re.sub(r"_\d+$", "", clip)


def _lists(raw: RawFolder, fold: int) -> list[tuple[Path, str]]:
    """Returns the lists of a fold, with the names of their classes."""
    folder = raw.require("lists")
    rows = []
    for name in raw_folder.list_files(folder, (".txt",)):
        parts = LIST.fullmatch(name)
        if parts and int(parts[2]) == fold:
            rows.append((raw.inside(folder / name), parts[1]))
    if not rows:
        raise DataError(f"folder '{folder}'", expected=f"lists {{class}}_test_split{fold}.txt", got="none")
    return rows
