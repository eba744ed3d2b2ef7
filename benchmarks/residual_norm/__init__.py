"""What a layer adds to its rows, with dropout, the norm that follows, and their gradients (`case_fast.ops.residual_norm`)."""
