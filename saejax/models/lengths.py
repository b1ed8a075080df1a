"""Lengths to which texts are padded, so that a run compiles few programs.

Three cases:

- The length of one call is known and later ones are not: ``round_length`` rounds it up to a fixed grid.
- The lengths of all texts are known: ``bucket_lengths`` chooses the lengths at which padding and compiling together
  cost least, and ``even_batches`` forms batches of them.
- They are known, and run in parts that share programs: ``part_batches`` forms the batches of a part.

Rows that hold no text, because devices need equally many, cost as much as others: texts that are next in length take
their places.
"""

import numpy as np

_MOST = 16  # lengths of programs


def round_length(length: int, multiple: int = 16) -> int:
    """Round a length up to a multiple of ``multiple``, or beyond 16 times that to an eighth of a power of two.

    With the default: 16, 32, ..., 256, 288, 320, ..., 512, 576, ...: at most an eighth longer, 8 lengths per octave.
    """
    step = max(multiple, 2 ** (length - 1).bit_length() // 16)
    return -(-length // step) * step


def bucket_lengths(counts: np.ndarray, compile_cost: int) -> np.ndarray:
    """Return the padded lengths at which padding and compiling together take the least time.

    Without the limit, many texts would get a program for each of their lengths. Compiled programs stay in memory, and
    padding to 16 lengths that suit the texts adds 3 to 6 %.

    Args:
      counts: number of texts of each length in tokens, from 0.
      compile_cost: number of tokens that run in the time that compiling one more program takes.

    Returns:
      Rising lengths, at most 16; a text is padded to the first that is not shorter. The last is the longest text's.
    """
    lengths = _cheapest_lengths(counts, compile_cost)
    # At a higher price of a program fewer are worth it.
    while len(lengths) > _MOST:
        compile_cost *= 2
        lengths = _cheapest_lengths(counts, compile_cost)
    return lengths


def _cheapest_lengths(counts: np.ndarray, compile_cost: int) -> np.ndarray:
    """Return the lengths of least total cost, by dynamic programming over the distinct lengths."""
    length_U = np.flatnonzero(counts)
    count_U = counts[length_U]
    shorter = np.concatenate([[0], np.cumsum(count_U)])  # number of shorter texts
    cost, previous_U = np.zeros(len(length_U) + 1), np.zeros(len(length_U), np.int64)
    for i, length in enumerate(length_U):
        # Least cost of all texts up to this length, if the next shorter bucket ends at each earlier length.
        costs = cost[: i + 1] + (shorter[i + 1] - shorter[: i + 1]) * length + compile_cost
        previous_U[i] = np.argmin(costs)
        cost[i + 1] = costs[previous_U[i]]
    chosen, i = [], len(length_U)
    while i:
        chosen.append(length_U[i - 1])
        i = int(previous_U[i - 1])
    return np.array(chosen[::-1], np.int64)


def rows_per_batch(batch_tokens: int, length: int, row_multiple: int) -> int:
    """Return the rows of a full batch of texts of one padded ``length``; see ``even_batches``."""
    return max(batch_tokens // (length * row_multiple) * row_multiple, row_multiple)


def even_batches(
    lengths_N: np.ndarray, batch_tokens: int, row_multiple: int, compile_cost: int
) -> list[tuple[np.ndarray, int, int]]:
    """Divide texts into batches of few shapes and even size.

    The longest texts come first: what does not fit into memory fails at once.

    Args:
      lengths_N: lengths of the texts in tokens, at least 1.
      batch_tokens: most tokens of a batch, padding included, unless ``row_multiple`` texts have more.
      row_multiple: the rows of a batch, filled up, are a multiple of this.
      compile_cost: as for ``bucket_lengths``.

    Returns:
      For each batch the indices of its texts, its rows (at least as many) and its length.
    """
    lengths = bucket_lengths(np.bincount(lengths_N), compile_cost)
    bucket_N = np.searchsorted(lengths, lengths_N)
    order_N = np.argsort(-bucket_N, kind="stable")
    length_N, stop_N = lengths[bucket_N[order_N]], _stops(bucket_N[order_N])
    batches, begin = list[tuple[np.ndarray, int, int]](), 0
    while begin < len(order_N):
        length, same = int(length_N[begin]), int(stop_N[begin]) - begin
        count = -(-same // rows_per_batch(batch_tokens, length, row_multiple))
        # Rows are spread evenly: full batches and a small last one would all be padded to the same shape.
        rows = -(-same // (count * row_multiple)) * row_multiple
        if row_multiple > 1:
            texts = order_N[begin : begin + count * rows]
            parts = np.split(texts, range(rows, len(texts), rows))
            batches += [(part, -(-len(part) // row_multiple) * row_multiple, length) for part in parts]
        else:
            texts = order_N[begin : begin + same]
            batches += [(part, rows, length) for part in np.split(texts, range(rows, same, rows))]
        begin += len(texts)
    return batches


def part_batches(
    lengths_N: np.ndarray, lengths: np.ndarray, batch_tokens: int, row_multiple: int, compile_cost: int
) -> list[tuple[np.ndarray, int, int]]:
    """Divide a part of many texts into batches with the shapes of other parts, as nearly as that is cheap.

    Args:
      lengths_N: lengths of the part's texts in tokens, at least 1.
      lengths: rising lengths of programs, of which the last is no shorter than any text.
      batch_tokens: as for ``even_batches``.
      row_multiple: as for ``even_batches``.
      compile_cost: as for ``bucket_lengths``. Numbers of rows are a multiple of as many as hold so many tokens.

    Returns:
      As ``even_batches``; texts of equal length keep their order.
    """
    order_N = np.argsort(-np.asarray(lengths_N, np.int64), kind="stable")
    bucket_N = np.searchsorted(lengths, lengths_N[order_N])
    length_N, stop_N = lengths[bucket_N], _stops(bucket_N)
    batches, begin = [], 0
    while begin < len(order_N):
        length, left = int(length_N[begin]), len(order_N) - begin
        most = rows_per_batch(batch_tokens, length, row_multiple)
        step = min(most, -(-max(compile_cost // length, 1) // row_multiple) * row_multiple)
        # A large batch ends with its length: much shorter texts would be padded to it.
        rows = min(most, -(-(int(stop_N[begin]) - begin) // step) * step)
        if rows > left and row_multiple > 1:  # nothing fills it up
            rows = -(-left // row_multiple) * row_multiple
        batches.append((order_N[begin : begin + rows], rows, length))
        begin += rows
    return batches


def _stops(bucket_N: np.ndarray) -> np.ndarray:
    """Return, of falling numbers, the place after the last one that is equal to each."""
    return np.searchsorted(-bucket_N, -bucket_N, side="right")
