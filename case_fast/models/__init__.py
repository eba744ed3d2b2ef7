"""Models: they share layers, data, training and evaluation."""

from case_fast.models.case import CASE, CASEOutput
from case_fast.models.config import ABLATIONS, CASEConfig

__all__ = ["ABLATIONS", "CASE", "CASEConfig", "CASEOutput"]
