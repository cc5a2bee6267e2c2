"""Results as tidy rows, with paired statistics."""

from .comparison_results import ComparisonResults as ComparisonResults
from .result_rows import RunResult as RunResult
from .result_rows import build_results as build_results
from .result_rows import describe_environment as describe_environment
from .result_rows import load_results as load_results
from .result_rows import merge_results as merge_results
from .result_rows import paired_values as paired_values
from .result_rows import run_identity as run_identity
from .result_rows import summarize_runs as summarize_runs
from .result_rows import validate_results as validate_results
from .result_rows import write_results as write_results
from .task_metrics import Metric as Metric
from .task_metrics import MetricValue as MetricValue
