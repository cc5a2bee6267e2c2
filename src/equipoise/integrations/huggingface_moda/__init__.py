"""MODA for Hugging Face models: `apply_moda`."""

from .apply_moda_layers import apply_moda as apply_moda
from .moda_adapter import MODAAdapter as MODAAdapter
