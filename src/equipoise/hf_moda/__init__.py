"""MODA for Hugging Face models: `apply_moda`."""

from .apply import apply_moda as apply_moda
from .moda import Moda as Moda
