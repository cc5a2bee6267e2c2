"""Diagnostics: what a model does with its modalities, and what it costs."""

from .cost import Cost as Cost
from .cost import cost as cost
from .noise import NoiseResponse as NoiseResponse
from .noise import noise_response as noise_response
