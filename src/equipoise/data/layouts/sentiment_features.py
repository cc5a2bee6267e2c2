"""Features of CMU-MOSEI and CMU-MOSI in the pickles of MultiBench and MMSA."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ...io.atomic_files import atomic_write, open_atomic
from .published_layout import Layout, Option, RawSample, Scan, Settings
from .restricted_pickle import load_restricted_pickle

MODALITIES = ("text", "audio", "vision")
SPLITS = {"train": "train", "valid": "val", "test": "test"}
LABELS = ("regression_labels", "labels")
BINS = ("very negative", "negative", "slightly negative", "neutral", "slightly positive", "positive", "very positive")

TASKS: dict[str, tuple[tuple[str, ...], Callable[[float], int | None]]] = {
    "acc3": (("negative", "positive", "neutral"), lambda y: 0 if y < -0.5 else 1 if y > 0.5 else 2),
    "acc2_has0": (("negative", "non-negative"), lambda y: int(y >= 0)),
    "acc2_non0": (("negative", "positive"), lambda y: None if y == 0 else int(y > 0)),
    "acc7": (BINS, lambda y: seven_bins(y)),
    "acc7_round": (BINS, lambda y: round(min(3.0, max(-3.0, y))) + 3),
    "regression": ((), lambda y: 0),
}
"""Task -> names of its classes, and the class of a score in [-3, 3]; None leaves the sample out."""


def seven_bins(score: float) -> int:
    """Class of a score with the bins (-inf, -2), [-2, -1), [-1, 0), {0}, (0, 1], (1, 2], (2, inf).

    Example:
        >>> [seven_bins(y) for y in (-2.5, -2.0, -0.3, 0.0, 1.0, 1.5, 2.2)]
        [0, 1, 2, 3, 4, 5, 6]
    """
    if score < 0:
        return 0 if score < -2 else 1 if score < -1 else 2
    return 3 if score == 0 else 4 if score <= 1 else 5 if score <= 2 else 6


class SentimentPickle(Layout):
    """Base class of CMU-MOSEI and CMU-MOSI.

    Minus infinity in the audio becomes 0; samples whose text is zero everywhere are dropped; steps before the first and
    after the last word are cut. Other values that are not finite drop the sample. A modality that is zero everywhere
    is missing.
    """

    license = "research use; the videos belong to their uploaders"
    groups = "source video"
    columns = dict.fromkeys(MODALITIES, "sequence")
    options = {  # noqa: RUF012
        "task": Option("acc3", tuple(TASKS), "what the target is: classes of the score, or the score"),
    }

    def scan(self, settings: Settings) -> Scan:
        path = settings.raw.require("pickle")
        content = self._arrays(path, settings.scratch)
        names, of_score = TASKS[settings.options["task"]]
        samples, dropped, ids, repeated = [], {}, set(), 0
        for split, part in content.items():
            for row, (name, score, length) in enumerate(zip(part["id"], part["score"], part["length"], strict=True)):
                identity = name if part["segments"] else f"{name}#{row}"
                if identity in ids:
                    repeated += 1
                    dropped[f"{identity} ({split}, row {row})"] = f"id '{identity}': expected once, got another time."
                    continue
                ids.add(identity)
                if not np.isfinite(score):
                    dropped[identity] = f"label of '{identity}': expected a finite score, got {score}."
                    continue
                target = of_score(score)
                if target is None:
                    dropped[identity] = f"label of '{identity}': expected a score other than 0 for acc2_non0, got 0."
                    continue
                extra = {"transcript": part["transcript"][row]} if part["transcript"] else {}
                files = {"pickle": [str(path)]}
                rows = {
                    "row": row,
                    "part": list(SPLITS).index(split),
                    **{f"{modality}_length": n for modality, n in length.items()},
                }
                samples.append(
                    RawSample(
                        identity, SPLITS[split], target if names else float(score), group_of(name),
                        names[target] if names else "", files, rows, extra,
                    )
                )  # fmt: skip
        notes = [f"{repeated} rows repeat an id and were left out."] if repeated else []
        return Scan(samples, dropped, notes, list(names))

    def convert(self, sample: RawSample, settings: Settings) -> dict[str, Any]:
        split = list(SPLITS)[sample.rows["part"]]
        values = {}
        for name in MODALITIES:
            array = np.load(settings.scratch / f"{split}_{name}.npy", mmap_mode="r", allow_pickle=False)
            values[name] = np.array(array[sample.rows["row"]], dtype=np.float32)
        audio = values["audio"]
        audio[np.isneginf(audio)] = 0.0
        for name, part in values.items():
            if not np.isfinite(part).all():
                kind = "NaN" if np.isnan(part).any() else "infinity"
                raise DataError(f"{name} of '{sample.id}'", expected="finite values", got=kind)
        if not values["text"].any():
            raise DataError(f"text of '{sample.id}'", expected="words", got="zeros everywhere")
        aligned = len({len(part) for part in values.values()}) == 1
        spoken = _used(values["text"])
        features: dict[str, Any] = {}
        for name, part in values.items():
            length = sample.rows.get(f"{name}_length", 0)
            if not part.any():
                features[name] = None
            else:
                features[name] = part[spoken] if aligned else part[:length] if length else part[_used(part)]
        return features

    def finish(self, settings: Settings) -> None:
        shutil.rmtree(settings.scratch, ignore_errors=True)

    def _arrays(self, path: Path, scratch: Path) -> dict[str, Any]:
        """Returns ids, scores and lengths, after writing the features to the scratch folder, once."""
        state = path.stat()
        stamp, index = f"{os.path.realpath(path)} {state.st_size} {state.st_mtime_ns}", scratch / "index.json"
        try:
            stored = json.loads(index.read_text(encoding="utf-8"))
            if stored["stamp"] == stamp:
                return stored["splits"]
        except (OSError, ValueError, KeyError):
            pass
        content, who = load_restricted_pickle(path, who=self.name), f"{self.name} '{path}'"
        if not isinstance(content, dict) or not set(SPLITS) <= set(content):
            got = f"the keys {sorted(map(str, content))[:5]}" if isinstance(content, dict) else type(content).__name__
            raise DataError(who, expected="a dict with the keys train, valid and test", got=got)
        splits = {}
        for split in SPLITS:
            part = content[split]
            features, described = read_split(part, f"{who}, {split}")
            for name, values in features.items():
                with open_atomic(scratch / f"{split}_{name}.npy") as file:
                    np.save(file, values, allow_pickle=False)
            splits[split] = described
        atomic_write(index, json.dumps({"stamp": stamp, "splits": splits}))
        return splits


def read_split(part: Any, who: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Checks one split of a pickle.

    Returns:
        {modality: (sample, time, feature)}, and {"id", "score", "length", "transcript", "segments"} as plain lists.

    Raises:
        DataError: an entry is missing, has another type or shape, or another number of samples.
    """
    if not isinstance(part, Mapping):
        raise DataError(who, expected="a dict", got=type(part).__name__)
    label = next((name for name in LABELS if name in part), None)
    missing = [name for name in (*MODALITIES, "id") if name not in part] + ([] if label else [" or ".join(LABELS)])
    if missing:
        raise DataError(who, expected="text, audio, vision, id and labels", got=f"none for {', '.join(missing)}")
    features = {}
    for name in MODALITIES:
        values = np.asarray(part[name])
        if values.dtype.kind not in "fiu" or values.ndim != 3:
            raise DataError(
                f"{who}, {name}", expected="numbers (sample, time, feature)", got=f"{values.dtype} {values.shape}"
            )
        features[name] = values
    scores = np.asarray(part[label])
    if scores.dtype.kind not in "fiu":
        raise DataError(f"{who}, {label}", expected="numbers", got=f"{scores.dtype} {scores.shape}")
    count = len(scores)
    # MOSEI's labels may have further columns for emotions; the first one is the sentiment.
    scores = scores.reshape(count, -1)[:, 0].astype(float) if count else np.zeros(0)
    ids = [_id(value) for value in part["id"]]
    sizes = {**{name: len(values) for name, values in features.items()}, "id": len(ids)}
    wrong = {name: size for name, size in sizes.items() if size != count}
    if wrong:
        name, size = next(iter(wrong.items()))
        raise DataError(f"{who}, {name}", expected=f"as many samples as labels = {count}", got=f"{size}")
    lengths: list[dict[str, int]] = [{} for _ in range(count)]
    for name in MODALITIES:
        stored_lengths = part.get(f"{name}_lengths")
        if stored_lengths is not None and len(stored_lengths) == count:
            for row, value in enumerate(stored_lengths):
                lengths[row][name] = min(max(1, int(value)), features[name].shape[1])
    texts = [str(value) for value in part["raw_text"]] if len(part.get("raw_text", ())) == count else []
    segments = len(set(ids)) > 1 and any(re.search(r"[\[\]$]|_\S+$", name) for name in ids)
    described = {
        "id": ids, "score": scores.tolist(), "length": lengths, "transcript": texts, "segments": segments
    }  # fmt: skip
    return features, described


def group_of(name: str) -> str:
    """Returns the video that a segment was cut from.

    Example:
        >>> [group_of(name) for name in ("-3g5yACwYnA$_$10", "03bSnISJMiM[4]", "-3g5yACwYnA_82.7_90.2", "abc_7")]
        ['-3g5yACwYnA', '03bSnISJMiM', '-3g5yACwYnA', 'abc']
    """
    name = name.split("$_$")[0].split("[")[0]
    return re.sub(r"(_\d+(\.\d+)?){1,2}$", "", name) or name


def _id(value: Any) -> str:
    """Returns an id as text; MultiBench has arrays of the video, its start and its end."""
    parts = value if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) else [value]
    texts = [
        part.decode("utf-8", "replace") if isinstance(part, bytes) else str(part)
        for part in np.ravel(np.array(parts, object))
    ]
    return "_".join(texts)


def _used(values: np.ndarray) -> slice:
    """Returns the steps from the first to the last one that is not zero."""
    steps = np.flatnonzero(values.any(axis=1))
    return slice(int(steps[0]), int(steps[-1]) + 1)
