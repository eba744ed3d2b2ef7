"""Both losses of the decoder over the vocabulary, and its most probable words (`linear_cross_entropy`, `top_words`)."""
