"""Attention of one query a sequence over its rows, as an encoder's last layer needs it (`case_fast.ops.pooled_attention`)."""
