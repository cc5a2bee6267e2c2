"""Published models put to the same work as our own: CLIP and its kin at the emoji, those that write at the scenes."""

from .benchmark import evaluate as evaluate
from .contrastive_models import PretrainedDualEncoder as PretrainedDualEncoder
from .contrastive_models import ProcessedDataset as ProcessedDataset
from .generative_models import GenerativeVLM as GenerativeVLM
