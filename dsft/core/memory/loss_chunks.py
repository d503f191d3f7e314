"""How many rows of logits exist at once in the loss; the loss and the memory arithmetic both take it from here."""

LOSS_CHUNK_BYTES = 256 * 1024**2
"""Most bytes of logits in a chunk, at `BYTES_PER_LOGIT` each: large enough for matrix products at full speed."""

BYTES_PER_LOGIT = 6
"""A logit in float32, and beside it the 16-bit product it came from or its 16-bit gradient."""


def chunk_rows(vocab_size: int) -> int:
    """Return the rows of a chunk: a multiple of 128 where so many fit, and at least 16."""
    rows = LOSS_CHUNK_BYTES // (BYTES_PER_LOGIT * vocab_size)
    return max(16, rows // 128 * 128 if rows >= 128 else rows)
