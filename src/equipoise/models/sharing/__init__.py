"""Models in folders and on the Hugging Face Hub: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``."""

from .hub_methods import HubMethods as HubMethods
from .hub_methods import find_pretrained as find_pretrained
from .hub_methods import load_pretrained as load_pretrained
