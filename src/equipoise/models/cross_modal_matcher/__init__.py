"""Cross-modal matching: assigns the items of one modality to those of another."""

from .matcher_model import CrossModalMatcher as CrossModalMatcher
