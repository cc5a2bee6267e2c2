"""Building blocks: attention that returns shares, transformer layers, duplex alignment."""

from .attention import Attended as Attended
from .attention import attend as attend
from .attention.modular import ModularAttentionResult as ModularAttentionResult
from .attention.modular import modular_attention as modular_attention
from .attention.pseudo_attention import PseudoAttention as PseudoAttention
from .duplex import DuplexAligner as DuplexAligner
from .gradient_checkpointing import enable_gradient_checkpointing as enable_gradient_checkpointing
from .transformer import Attention as Attention
from .transformer import Transformer as Transformer
