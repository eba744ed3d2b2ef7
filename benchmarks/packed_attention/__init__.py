"""Attention of packed sequences, as encoders and decoders need it in training (`case_fast.ops.packed_attention`)."""
