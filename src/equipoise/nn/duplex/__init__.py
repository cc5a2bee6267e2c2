"""Keys of one modality, aligned with what the others' keys look like: MODA's duplex attention alignment."""

from .duplex_aligner import Aligned as Aligned
from .duplex_aligner import DuplexAligner as DuplexAligner
from .modality_bases import Moments as Moments
from .modality_bases import basis_of as basis_of
