"""Attention that says where it went: `attend`, from fused kernels where there are some."""

from .fused_share import Attended as Attended
from .fused_share import attend as attend
from .fused_share import shares as shares
