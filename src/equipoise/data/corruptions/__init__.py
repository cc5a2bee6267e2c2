"""Catalog of input corruptions for sequences, spectrograms, images, vectors and tokens, with five severities."""

from .catalog import CORRUPTIONS as CORRUPTIONS
from .catalog import SEVERITIES as SEVERITIES
from .catalog import CorruptedInput as CorruptedInput
from .catalog import Corruption as Corruption
from .catalog import check_corruptions as check_corruptions
from .catalog import corrupt_batch as corrupt_batch
from .catalog import corrupt_input as corrupt_input
from .catalog import corruption_names as corruption_names
from .catalog import replace_samples as replace_samples
from .input_frames import KINDS as KINDS
from .input_frames import InputFrames as InputFrames
from .input_frames import InputKind as InputKind
from .input_frames import infer_kind as infer_kind
