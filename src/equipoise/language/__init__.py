"""A small vision-language model: encoder, connector, causal language model; and where its words look."""

from .connectors import CONNECTORS as CONNECTORS
from .grounding import Pointing as Pointing
from .grounding import attention_map as attention_map
from .grounding import pointing as pointing
from .judging import judged as judged
from .model import PictureLanguageModel as PictureLanguageModel
