"""Token ids in, token ids out: the passes through a model, the choice of tokens, and the loops around both."""
