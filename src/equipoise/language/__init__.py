"""A small vision-language model: encoder, connector, causal language model; and where its words look."""

from .connectors import CONNECTORS as CONNECTORS
from .judging import judged as judged
from .model import PictureLanguageModel as PictureLanguageModel
from .pointing import Pointing as Pointing
from .pointing import pointing as pointing
