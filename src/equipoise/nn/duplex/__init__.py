"""Duplex attention alignment of keys (MODA)."""

from .duplex_aligner import Aligned as Aligned
from .duplex_aligner import DuplexAligner as DuplexAligner
from .modality_bases import Moments as Moments
from .modality_bases import basis_of as basis_of
