"""The order of a sweep's programs over the logits: groups of rows, one after the other.

The programs that run at the same time compute logits of one group of rows and of a part of the
vocabulary. Without groups, they would read all hidden states for every tile of the vocabulary.
Hidden states are larger than a GPU's cache. With groups of rows, the head is read once for each
group.
"""

from __future__ import annotations

import math

# The number of rows in a group. About 132 programs run at the same time, each over 128 by 128
# logits. Together they read the fewest bytes if their logits form a square, with 1470 rows and
# columns. With a simulated cache, 1536 rows read the fewest bytes (``test_row_groups.py``).
GROUP_ROWS = 1536
# The size of a GPU's cache. Data sheets give 40 MiB (A100) and 50 MiB (H100).
CACHE_BYTES = 40 << 20


def group_blocks(tokens: int, block_rows: int) -> int:
    """Return the number of row blocks in a group. All groups have about the same size."""
    return math.ceil(math.ceil(tokens / block_rows) / math.ceil(tokens / GROUP_ROWS))


def operand_reads(tokens: int, vocab_size: int, row_bytes: int, parts: int = 1) -> tuple[int, int]:
    """Return how often a sweep reads all hidden states, and all rows of the head.

    ``row_bytes`` is the size of one row in all operands of the sweep. The sweep processes ``parts``
    of the vocabulary one after the other.
    """
    rows = max(1, min(tokens, GROUP_ROWS))
    # The number of columns whose logits are computed at the same time, for one group of rows.
    columns = min(vocab_size, GROUP_ROWS**2 // rows)
    stays = (rows + columns) * row_bytes <= CACHE_BYTES
    reads = parts if stays else max(parts, math.ceil(vocab_size / columns))
    return reads, math.ceil(tokens / GROUP_ROWS)
