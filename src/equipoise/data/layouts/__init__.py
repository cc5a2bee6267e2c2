"""Published layouts of data sets: reads raw downloads and writes folders with a manifest that recipes can train on."""

from __future__ import annotations

from ...errors import unknown_name
from .av_mnist_arrays import AVMNIST
from .cremad import CREMAD
from .hmdb51 import HMDB51
from .kinetics_sounds import KineticsSounds
from .mosei_pickle import MOSEI
from .mosi_pickle import MOSIPickle
from .preparation import Preparation, prepare
from .published_layout import Layout
from .restricted_pickle import load_restricted_pickle
from .ucf101 import UCF101
from .verification import Verification, verify

__all__ = [
    "Layout", "Preparation", "Verification", "available_layouts", "find_layout", "load_restricted_pickle", "prepare",
    "verify",
]  # fmt: skip


def available_layouts() -> dict[str, Layout]:
    """Returns {name: layout} of all published layouts.

    Example:
        >>> sorted(available_layouts())
        ['av_mnist', 'cremad', 'hmdb51', 'kinetics_sounds', 'mosei', 'mosi', 'ucf101']
    """
    classes = (CREMAD, KineticsSounds, MOSEI, MOSIPickle, AVMNIST, UCF101, HMDB51)
    return {cls.name: cls() for cls in classes}


def find_layout(name: str) -> Layout:
    """Returns a layout by its name.

    Raises:
        ConfigError: unknown name; the message lists the closest ones.
    """
    layouts = available_layouts()
    if name not in layouts:
        raise unknown_name("data", "data set", name, layouts)
    return layouts[name]
