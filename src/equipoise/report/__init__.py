"""Results in, one self-contained HTML page out: readings, figures, sentences, and the page that holds them."""

from .comparison_page import page as page
from .comparison_page import report as report
from .results_view import ResultsView as ResultsView
