"""A small saved data set of ``datasets`` with splits of uneven sizes."""

import datasets
import numpy as np

TRAIN, VAL, TEST = 61, 13, 10


def write_data(folder):
    """Writes a saved data set with named splits of uneven sizes; some cells are missing."""
    random = np.random.default_rng(0)
    rows = TRAIN + VAL + TEST
    label = random.integers(0, 3, rows)
    vector = [None if i % 9 == 0 else (random.normal(size=4) + one).tolist() for i, one in enumerate(label)]
    content = {
        "vector": vector, "number": random.normal(size=rows), "label": [f"c{one}" for one in label],
        "split": ["train"] * TRAIN + ["val"] * VAL + ["test"] * TEST,
    }  # fmt: skip
    datasets.Dataset.from_dict(content).save_to_disk(str(folder / "data"), num_shards=3)
