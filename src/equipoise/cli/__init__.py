"""The program ``equipoise``."""

from .main import main as main
from .main import parser as parser
from .main import run as run
