"""The kernels and what runs them. Importing this package needs only torch and numpy (and triton, where it is there)."""

from __future__ import annotations

from case_fast.ops.backend import backend_name, native_report
from case_fast.ops.bilinear_mim import bilinear_mim, mim_sides
from case_fast.ops.cross_attention import PreparedSources, RowSource, Source, cross_attention, prepare_sources
from case_fast.ops.graph_attention import graph_attention
from case_fast.ops.linear import linear
from case_fast.ops.linear_cross_entropy import linear_cross_entropy, top_words
from case_fast.ops.packed_attention import packed_attention
from case_fast.ops.pooled_attention import pooled_attention
from case_fast.ops.residual_norm import residual, residual_norm
from case_fast.ops.segment_sum import segment_log_softmax, segment_mean, segment_sum, take

__all__ = [
    "PreparedSources",
    "RowSource",
    "Source",
    "backend_name",
    "bilinear_mim",
    "cross_attention",
    "graph_attention",
    "linear",
    "linear_cross_entropy",
    "mim_sides",
    "native_report",
    "packed_attention",
    "pooled_attention",
    "prepare_sources",
    "residual",
    "residual_norm",
    "segment_log_softmax",
    "segment_mean",
    "segment_sum",
    "take",
    "top_words",
]
