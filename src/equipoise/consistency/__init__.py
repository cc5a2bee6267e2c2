"""Consistency of maps between modalities: composing two maps should give the direct map."""

from .consistency_loss import ConsistencyLoss as ConsistencyLoss
from .cycle_consistency import cycle_error as cycle_error
from .cycle_consistency import pair_error as pair_error
from .cycle_consistency import worst_contradictions as worst_contradictions
from .cycle_consistency import worst_cycles as worst_cycles
from .pairwise_maps import supermatrix as supermatrix
from .pairwise_maps import supermatrix_from_attention as supermatrix_from_attention
from .pairwise_maps import supermatrix_from_tokens as supermatrix_from_tokens
from .slot_pooling import pool_to_slots as pool_to_slots
from .spectrum import consistency_score as consistency_score
from .spectrum import contradiction_excess as contradiction_excess
from .spectrum import effective_rank as effective_rank
from .spectrum import ideal_spectrum as ideal_spectrum
from .spectrum import nuclear_norm as nuclear_norm
from .spectrum import spectral as spectral
from .spectrum import top_energy as top_energy
from .synchronization import synchronize as synchronize
