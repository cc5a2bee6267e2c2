"""Attention that says where it went: `attend`, from fused kernels where there are some."""

from .attend import Attended as Attended
from .attend import attend as attend
from .attend import shares as shares
