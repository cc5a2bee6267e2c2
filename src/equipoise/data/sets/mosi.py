"""`mosi`: utterances of movie reviews, positive or negative, as vectors of text, audio and video (CMU-MOSI)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import DataError
from ..counter_rng import CounterRNG
from ..data_root import find_data_dir
from ..dataset import Dataset, Split
from ..feature_scaling import FeatureScaling, valid_statistics
from ..label_pairing import permutation
from .published_csv import read_table

FEATURES = {"text": 100, "audio": 73, "video": 100}
ROWS = {"train": 1447, "test": 752}
VAL_VIDEOS = 12
"""Of the 62 training videos, kept for validation."""
SOURCE = (
    "It holds {text,audio,video}_{train,test}.csv of CMU-MOSI (Zadeh et al. 2016; features of bc-LSTM, Poria et al. "
    "2017), "
    "and video_of_{train,test}.csv."
)


class MOSI(Dataset):
    """CMU-MOSI: 2,199 utterances from 93 video reviews; the target is 1 for positive sentiment, else 0.

    Inputs are one vector per utterance: "text" (100,), "audio" (73,) and "video" (100,), each feature standardized with
    the training split. The test split is the published one; the validation split is 12 of the 62 training videos. See
    docs/data/mosi.md.

    Args:
        root: folder that contains ``mosi``; searched after the environment's EQUIPOISE_DATA.

    Raises:
        DataError: the folder or a file is missing, truncated or damaged, or the files of the modalities differ in
            labels.
    """

    names = ("text", "audio", "video")
    num_outputs = 2

    def __init__(self, root: str | Path | None = None) -> None:
        folder = find_data_dir("mosi", root, SOURCE)
        (train, label, video), (test, test_label, test_video) = (_read(folder, split) for split in ROWS)
        shared = set(video.tolist()) & set(test_video.tolist())
        if shared:
            raise DataError(
                f"'{folder}'", expected="videos that occur in one split only", got=f"video {min(shared)} in both",
                fix="Restore video_of_train.csv and video_of_test.csv.",
            )  # fmt: skip
        videos = video.unique()
        held_out = videos[permutation(len(videos), "mosi/videos")[:VAL_VIDEOS]]
        val = torch.isin(video, held_out)
        scaling = {name: FeatureScaling.fit(values[~val]) for name, values in train.items()}
        rows = {"train": (train, label, ~val), "val": (train, label, val)}
        rows["test"] = (test, test_label, torch.ones(len(test_label), dtype=torch.bool))
        self.train, self.val, self.test = (
            Split({name: scaling[name](values[row]) for name, values in inputs.items()}, target[row])
            for inputs, target, row in rows.values()
        )
        self.noise = {name: valid_statistics(values) for name, values in self.train.inputs.items()}

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs


def _read(folder: Path, split: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Returns the features {name: (utterance, feature)}, the labels and the videos of a published split."""
    inputs, labels = {}, {}
    for name, features in FEATURES.items():
        columns = [f"feature {i}" for i in range(1, features + 1)]
        table = read_table(folder / f"{name}_{split}.csv", [*columns, "label"], rows=ROWS[split], header=False)
        inputs[name], labels[name] = table.numbers(columns), table.labels("label", 2)
    for name in ("audio", "video"):
        differ = (labels[name] != labels["text"]).nonzero()[:, 0].tolist()
        if differ:
            raise DataError(
                f"'{folder / f'{name}_{split}.csv'}' line {differ[0] + 1}",
                expected=f"the label of text_{split}.csv, {labels['text'][differ[0]]}",
                got=f"{labels[name][differ[0]]}", fix="The files are not of the same utterances: download them again.",
            )  # fmt: skip
    video = read_table(folder / f"video_of_{split}.csv", ["video"], rows=ROWS[split]).labels("video", 93)
    return inputs, labels["text"], video
