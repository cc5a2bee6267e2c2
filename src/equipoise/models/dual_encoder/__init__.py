"""Dual encoder: one encoder per modality, trained so that matching samples have similar embeddings."""

from .dual_encoder_model import DualEncoder as DualEncoder
