"""Encoders: from pictures, sequences and what Hugging Face models read, to tokens."""

from .backbone import Backbone as Backbone
from .base import Encoder as Encoder
from .convolutional import ConvEncoder as ConvEncoder
from .resnet import ResNetEncoder as ResNetEncoder
from .small import PatchEncoder as PatchEncoder
from .small import SequenceEncoder as SequenceEncoder
from .text import TextEncoder as TextEncoder
from .vit import ViTEncoder as ViTEncoder
