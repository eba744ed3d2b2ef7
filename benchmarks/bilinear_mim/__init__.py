"""The alignment losses over all pairs of a batch, or over drawn ones (`case_fast.ops.bilinear_mim`)."""
