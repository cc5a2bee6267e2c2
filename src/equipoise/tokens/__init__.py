"""Token batches with masks and modality labels."""

from .token_batch import Output as Output
from .token_batch import Tokens as Tokens
from .token_batch import as_tokens as as_tokens
from .token_batch import has_values as has_values
from .token_batch import pack as pack
from .token_batch import segment_labels as segment_labels
from .token_batch import unpack as unpack
