"""A whole diagnosis: every test that applies to a model, as figures, verdicts and a page."""

from .diagnose import diagnose as diagnose
from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import results as results
from .questions import QUESTIONS as QUESTIONS
