"""Metrics with signatures, the evaluation of a model on a split, and the report of a run."""

from case_fast.evaluation.evaluate import Evaluation, compare, evaluate
from case_fast.evaluation.metrics import Metric
from case_fast.evaluation.report import write_report

__all__ = ["Evaluation", "Metric", "compare", "evaluate", "write_report"]
