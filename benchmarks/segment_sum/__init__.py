"""Sums of rows by segment, and their gradients (`case_fast.ops.segment_sum`)."""
