"""Looking: where a vision-language model looks while it answers, and whether the answer needs it."""

from .inspect_model import Inspection as Inspection
from .inspect_model import look as look
from .pretrained_loading import LoadedModel as LoadedModel
from .pretrained_loading import load_pretrained as load_pretrained
