"""Encoders of images, sequences, vectors and text, and Hugging Face backbones, that return tokens."""

from .backbone import Backbone as Backbone
from .conv_encoder import ConvEncoder as ConvEncoder
from .encoder import Encoder as Encoder
from .resnet import ResNetEncoder as ResNetEncoder
from .small_encoders import PatchEncoder as PatchEncoder
from .small_encoders import SequenceEncoder as SequenceEncoder
from .text_encoder import TextEncoder as TextEncoder
from .vector import VectorEncoder as VectorEncoder
from .vit import ViTEncoder as ViTEncoder
