"""Attention that agrees with itself: if a sound maps to a picture and that to a word, the sound maps to the word."""

from .cycle import cycle_error as cycle_error
from .cycle import pair_error as pair_error
from .cycle import worst_contradictions as worst_contradictions
from .cycle import worst_cycles as worst_cycles
from .loss import ConsistencyLoss as ConsistencyLoss
from .pooling import pooled as pooled
from .rank import consistency_score as consistency_score
from .rank import contradiction_excess as contradiction_excess
from .rank import effective_rank as effective_rank
from .rank import ideal_spectrum as ideal_spectrum
from .rank import nuclear_norm as nuclear_norm
from .rank import spectral as spectral
from .rank import top_energy as top_energy
from .supermatrix import supermatrix as supermatrix
from .supermatrix import supermatrix_from_attention as supermatrix_from_attention
from .supermatrix import supermatrix_from_tokens as supermatrix_from_tokens
from .synchronize import synchronize as synchronize
