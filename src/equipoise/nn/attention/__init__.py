"""Attention functions that return the share of each modality, using fused kernels where available."""

from .fused_share import Attended as Attended
from .fused_share import attend as attend
from .fused_share import shares as shares
