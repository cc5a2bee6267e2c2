"""The program ``equipoise``."""

from .entry_point import main as main
from .entry_point import parser as parser
from .entry_point import run as run
