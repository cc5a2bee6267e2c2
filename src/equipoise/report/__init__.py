"""Results in, one self-contained HTML page out: readings, figures, sentences, and the page that holds them."""

from .page import page as page
from .page import report as report
from .readings import Readings as Readings
