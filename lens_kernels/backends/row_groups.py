"""The order of the programs of a sweep over the vocabulary: groups of rows, one after the other.

The programs that run at the same time make logits of a group of rows and of a part of the
vocabulary. With all rows first, every tile of the vocabulary would need all hidden states, which
are larger than a GPU's cache. With groups, each group reads the head once.
"""

from __future__ import annotations

import math

# Rows of a group. About 132 programs run at the same time, each with 128 by 128 logits (or twice
# as many with half of them). They read the fewest rows of both operands where these are equal in
# number: the square root of the logits, 1470. In a model of a cache, 1536 rows moved the least
# (``test_row_groups.py``).
GROUP_ROWS = 1536
# The cache of a GPU. Data sheets give 40 MiB (A100) and 50 (H100).
CACHE_BYTES = 40 << 20


def group_blocks(tokens: int, block_rows: int) -> int:
    """Return the number of row blocks in a group; groups have about the same size."""
    return math.ceil(math.ceil(tokens / block_rows) / math.ceil(tokens / GROUP_ROWS))


def operand_reads(tokens: int, vocab_size: int, row_bytes: int, parts: int = 1) -> tuple[int, int]:
    """Return how often a sweep reads all hidden states, and all rows of the head.

    ``row_bytes`` are those of one row of all operands of the sweep. It runs in ``parts`` of the
    vocabulary, one after the other.
    """
    rows = max(1, min(tokens, GROUP_ROWS))
    columns = min(vocab_size, GROUP_ROWS**2 // rows)  # of the programs that run at the same time
    stays = (rows + columns) * row_bytes <= CACHE_BYTES
    reads = parts if stays else max(parts, math.ceil(vocab_size / columns))
    return reads, math.ceil(tokens / GROUP_ROWS)
