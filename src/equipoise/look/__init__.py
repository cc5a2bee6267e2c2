"""Looking: where a vision-language model looks while it answers, and whether the answer needs it."""

from .load import Loaded as Loaded
from .load import load_any as load_any
from .look import Look as Look
from .look import look as look
