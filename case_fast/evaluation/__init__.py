"""Metrics with signatures, the evaluation of a model on a split, and the report of a run."""

from case_fast.evaluation.evaluate import Evaluation, compare, evaluate
from case_fast.evaluation.metrics import Metric

__all__ = ["Evaluation", "Metric", "compare", "evaluate"]
