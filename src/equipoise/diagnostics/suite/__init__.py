"""A whole diagnosis: every test that applies to a model, as figures, verdicts and a page."""

from .diagnosis_result import Diagnosis as Diagnosis
from .diagnosis_result import results as results
from .run_suite import diagnose as diagnose
from .test_registry import QUESTIONS as QUESTIONS
