"""A shared space: towers that bring pictures, sounds and words to one place, trained so that pairs lie close."""

from .dual_encoder_model import DualEncoder as DualEncoder
