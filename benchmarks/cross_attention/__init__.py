"""The decoder's attention to three sources, one word at a time and in training (`case_fast.ops.cross_attention`)."""
