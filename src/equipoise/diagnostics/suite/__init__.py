"""Diagnosis of a model: runs all applicable tests and summarizes them as metrics, findings and a report."""

from .diagnosis_result import Diagnosis as Diagnosis
from .diagnosis_result import results as results
from .run_suite import diagnose as diagnose
from .test_registry import OPTIONAL_TESTS as OPTIONAL_TESTS
from .test_registry import TESTS as TESTS
