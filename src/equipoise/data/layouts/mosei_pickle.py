"""Layout of CMU-MOSEI: the pickle of MultiBench or MMSA."""

from __future__ import annotations

from .raw_folder import Place
from .sentiment_features import SentimentPickle


class MOSEI(SentimentPickle):
    """CMU-MOSEI: text, audio and video features of sentences from YouTube, with a sentiment from -3 to 3."""

    name = "mosei"
    title = "CMU-MOSEI"
    source = (
        "https://github.com/pliang279/MultiBench (mosei_senti_data.pkl), "
        "https://github.com/thuiar/MMSA (aligned_50.pkl)"
    )
    places = {  # noqa: RUF012
        "pickle": Place(
            (
                "mosei_senti_data.pkl", "mosei_raw.pkl", "mosei.pkl", "mosei_senti_data_noalign.pkl", "aligned_50.pkl",
                "unaligned_50.pkl", "Processed/aligned_50.pkl", "Processed/unaligned_50.pkl",
            ),
            "pickle of MultiBench or MMSA with train, valid and test",
        ),
    }  # fmt: skip
    published = {"train": 16326, "val": 1871, "test": 4659}  # noqa: RUF012
