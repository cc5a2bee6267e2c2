"""Layout of CMU-MOSI: the pickle of MultiBench or MMSA."""

from __future__ import annotations

from .published_layout import Option
from .raw_folder import Place
from .sentiment_features import TASKS, SentimentPickle


class MOSIPickle(SentimentPickle):
    """CMU-MOSI: text, audio and video features of 2,199 sentences from YouTube, with a sentiment from -3 to 3."""

    name = "mosi"
    title = "CMU-MOSI"
    source = "https://github.com/pliang279/MultiBench (mosi_raw.pkl), https://github.com/thuiar/MMSA (aligned_50.pkl)"
    places = {  # noqa: RUF012
        "pickle": Place(
            (
                "mosi_raw.pkl", "mosi_data.pkl", "mosi.pkl", "mosi_data_noalign.pkl", "aligned_50.pkl",
                "unaligned_50.pkl", "Processed/aligned_50.pkl", "Processed/unaligned_50.pkl",
            ),
            "pickle of MultiBench or MMSA with train, valid and test",
        ),
    }  # fmt: skip
    options = {  # noqa: RUF012
        "task": Option("regression", tuple(TASKS), "what the target is: classes of the score, or the score"),
    }
    published = {"train": 1284, "val": 229, "test": 686}  # noqa: RUF012
