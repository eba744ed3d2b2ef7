"""Attention over the edges of ragged graphs, with relations (`case_fast.ops.graph_attention`)."""
