"""Keys of one modality, aligned with what the others' keys look like: MODA's duplex attention alignment."""

from .aligner import Aligned as Aligned
from .aligner import DuplexAligner as DuplexAligner
from .bases import Moments as Moments
from .bases import basis_of as basis_of
