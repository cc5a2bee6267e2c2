"""`utd_mhad`: 27 actions of eight people, from an inertial sensor and a skeleton of body joints (UTD-MHAD)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import DataError, require_extra, unknown_name
from ..counter_rng import CounterRNG
from ..data_root import find_data_dir
from ..dataset import Dataset, Split
from ..feature_scaling import FeatureScaling, valid_statistics

ACTIONS, SUBJECTS, TRIALS = range(1, 28), range(1, 9), range(1, 5)
UNPUBLISHED = frozenset({(8, 1, 4), (23, 6, 4), (27, 8, 4)})
"""(action, subject, trial) that were damaged when recorded and are not published."""
TEST_SUBJECTS = (2, 4, 6, 8)
VAL_SUBJECT, VAL_TRIAL = 7, 4
RATE = {"inertial": 50.0, "skeleton": 30.0}
"""Samples per second."""
JOINTS, HIP_CENTER = 20, 3
LONGEST = {"inertial": 1000, "skeleton": 600}
"""Samples of 20 seconds; published recordings are shorter than 7 seconds."""
VARIABLE = {"inertial": "d_iner", "skeleton": "d_skel"}
SOURCE = "It holds the folders Inertial and Skeleton of UTD-MHAD (Chen, Jafari, Kehtarnavaz, ICIP 2015)."
_NAME = re.compile(r"a(\d+)_s(\d+)_t(\d+)_(inertial|skeleton)\.mat")

Key = tuple[int, int, int]


class UTDMHAD(Dataset):
    """UTD-MHAD: 861 recordings of 27 actions by eight people; odd subjects are for training, even ones for the test.

    Inputs are sequences of variable length, padded with zeros and masked: "inertial" (326, 6), acceleration and angular
    velocity at 50 Hz, and "skeleton" (125, 60), the coordinates of 20 joints at 30 Hz relative to the hip center in the
    first frame. Each feature is standardized with the training split; times are seconds from the start. See
    docs/data/utd_mhad.md.

    Args:
        root: folder that contains ``utd_mhad``; searched after the environment's EQUIPOISE_DATA.
        validation: "subject" validates on subject 7, so that validation, like the test, is on a person who is not in
            the training split; "trial" validates on the fourth trial of every training subject.

    Raises:
        ConfigError: unknown validation.
        DataError: a folder or recording is missing, truncated or damaged.
        MissingExtraError: scipy is not installed.
    """

    names = ("inertial", "skeleton")
    num_outputs = len(ACTIONS)

    def __init__(self, root: str | Path | None = None, *, validation: str = "subject") -> None:
        if validation not in ("subject", "trial"):
            raise unknown_name("UTDMHAD", "validation", str(validation), ("subject", "trial"))
        files = {name: list_recordings(find_data_dir(f"utd_mhad/{name.title()}", root, SOURCE), name)
                 for name in self.names}  # fmt: skip
        keys = sorted(files["inertial"])
        values, masks = {}, {}
        for name in self.names:
            read = [read_recording(files[name][key], name) for key in keys]
            values[name] = torch.nn.utils.rnn.pad_sequence(read, batch_first=True)
            length = torch.tensor([len(recording) for recording in read])
            masks[name] = torch.arange(int(length.max())) < length[:, None]
        action, subject, trial = torch.tensor(keys).unbind(dim=1)
        test = torch.isin(subject, torch.tensor(TEST_SUBJECTS))
        val = ~test & (subject == VAL_SUBJECT if validation == "subject" else trial == VAL_TRIAL)
        train = ~test & ~val
        for name in self.names:
            values[name] = FeatureScaling.fit(values[name][train], masks[name][train])(values[name], masks[name])
        self.train, self.val, self.test = (
            Split(
                {name: sequences[rows] for name, sequences in values.items()},
                action[rows] - 1,
                mask={name: mask[rows] for name, mask in masks.items()},
                times={name: _times(mask[rows], RATE[name]) for name, mask in masks.items()},
                groups=[f"subject {number}" for number in subject[rows].tolist()],
            )
            for rows in (train, val, test)
        )
        self.noise = {
            name: valid_statistics(sequences, self.train.mask[name]) for name, sequences in self.train.inputs.items()
        }

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs


def list_recordings(folder: Path, name: str) -> dict[Key, Path]:
    """Returns {(action, subject, trial): file} of a modality.

    Raises:
        DataError: a .mat file with another name, or a published recording that is missing.
    """
    files: dict[Key, Path] = {}
    for path in sorted(folder.glob("*.mat")):
        match = _NAME.fullmatch(path.name)
        if match is None or match[4] != name:
            raise DataError(
                f"'{path}'", expected=f"a name a{{action}}_s{{subject}}_t{{trial}}_{name}.mat", got=repr(path.name),
                fix="Keep other files out of this folder.",
            )  # fmt: skip
        files[int(match[1]), int(match[2]), int(match[3])] = path
    published = {(a, s, t) for a in ACTIONS for s in SUBJECTS for t in TRIALS} - UNPUBLISHED
    if set(files) != published:
        missing, unknown = sorted(published - set(files)), sorted(set(files) - published)
        action, subject, trial = (missing or unknown)[0]
        example = f"a{action}_s{subject}_t{trial}_{name}.mat"
        got = f"{len(missing)} missing, such as {example}" if missing else f"{example}, which is not one of them"
        raise DataError(f"'{folder}'", expected=f"the {len(published)} published recordings", got=got,
                        fix="Extract the published archive again.")  # fmt: skip
    return files


def read_recording(path: Path, name: str) -> Float[Tensor, "time feature"]:
    """Reads a recording: (time, 6) of the inertial sensor, or (time, 60), joints relative to the first hip center.

    Raises:
        DataError: the file is damaged or truncated, its array is missing or has another shape, or a value is not
            finite.
    """
    with require_extra("UTDMHAD"):
        from scipy.io import loadmat
    who, variable = f"'{path}'", VARIABLE[name]
    again = "The file is truncated or damaged: extract it again."
    try:
        array = loadmat(path, variable_names=[variable]).get(variable)
    except Exception as error:  # scipy raises errors of many types for damaged files
        raise DataError(
            who, expected="a whole MATLAB file", got=f"{type(error).__name__}: {error}", fix=again
        ) from error
    shape = "(time, 6)" if name == "inertial" else f"({JOINTS}, 3, time)"
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise DataError(who, expected=f"an array '{variable}' of shape {shape}", got="none of numbers", fix=again)
    if name == "skeleton" and array.ndim == 3:
        array = array.transpose(2, 0, 1)
    if array.shape[1:] != ((6,) if name == "inertial" else (JOINTS, 3)) or not 1 <= len(array) <= LONGEST[name]:
        raise DataError(
            who,
            expected=f"'{variable}' of shape {shape}, time from 1 to {LONGEST[name]}",
            got=f"{array.shape}",
            fix=again,
        )
    if not np.isfinite(array).all():
        raise DataError(
            who, expected="finite values", got=f"{int((~np.isfinite(array)).sum())} that are not", fix=again
        )
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
    if name == "skeleton":
        values = (values - values[0, HIP_CENTER]).flatten(1)
    return values.float()


def _times(mask: Tensor, rate: float) -> Float[Tensor, "sample time"]:
    return torch.arange(mask.shape[1]).div(rate).expand(len(mask), -1).masked_fill(~mask, 0.0)
