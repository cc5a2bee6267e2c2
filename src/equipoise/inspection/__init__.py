"""Inspection of vision-language models: where attention goes, and how the answer depends on each input."""

from .inspect_model import Inspection as Inspection
from .inspect_model import look as look
from .pretrained_loading import LoadedModel as LoadedModel
from .pretrained_loading import load_pretrained as load_pretrained
