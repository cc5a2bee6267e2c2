"""Models that find what belongs together: which picture shows what is said, and which word says it."""

from .matcher_model import CrossModalMatcher as CrossModalMatcher
