"""The order in which the programs of a Triton kernel compute tiles of logits: by groups of rows.

Programs that run at the same time share a group of rows and a part of the vocabulary, which fit in
the GPU's cache. Without groups, all hidden states would be read again for every tile of the
vocabulary. With groups, the head is read once for each group.
"""

from __future__ import annotations

import math

# The number of rows in a group. A GPU runs about 132 programs at the same time, each on 128 by 128
# logits. They read the fewest bytes if their logits form a square of about 1470 rows and columns.
# In a simulated cache, 1536 rows are best (``test_row_groups.py``).
GROUP_ROWS = 1536
# The size of a GPU's cache. Data sheets state 40 MiB (A100) and 50 MiB (H100).
CACHE_BYTES = 40 << 20


def group_blocks(tokens: int, block_rows: int) -> int:
    """Return the number of row blocks in a group. Groups have about equal sizes."""
    return math.ceil(math.ceil(tokens / block_rows) / math.ceil(tokens / GROUP_ROWS))


def operand_reads(tokens: int, vocab_size: int, row_bytes: int, parts: int = 1) -> tuple[int, int]:
    """Return how often a kernel reads all hidden states, and how often it reads the whole head.

    ``row_bytes`` is the size of a row of hidden states or of the head. The kernel processes
    ``parts`` of the vocabulary one after the other.
    """
    rows = max(1, min(tokens, GROUP_ROWS))
    # The number of vocabulary entries that run at the same time for one group of rows.
    columns = min(vocab_size, GROUP_ROWS**2 // rows)
    stays = (rows + columns) * row_bytes <= CACHE_BYTES
    reads = parts if stays else max(parts, math.ceil(vocab_size / columns))
    return reads, math.ceil(tokens / GROUP_ROWS)
