"""Randomness as a function: the order of a data set from (seed, epoch), draws for each item.

The words come raw from Philox, a counter-based generator (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", 2011): the same on any machine, whoever asks and in whatever order. Nothing
here reads or moves the global generators of Python, numpy or torch.
"""

import operator
from collections.abc import Sequence

import numpy as np

from .errors import SetupError

_MASK = 2**64 - 1
_LOW = np.uint64(2**32 - 1)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)


def checked_seed(seed: object) -> int:
    """Return a seed as Python's integer, whatever integer it is.

    Raises:
        SetupError: it is none.
    """
    try:
        return operator.index(seed)  # ty: ignore[invalid-argument-type]
    except TypeError:
        raise SetupError("A seed is a whole number.", saw=f"seed={seed!r}") from None


def _lowest(number: int) -> int:
    return operator.index(number) & _MASK  # first as Python's: NumPy's integers overflow


def words(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return `n` raw 64-bit words, a pure function of (seed, epoch).

    Args:
        seed: any integer; its lowest 64 bits count.
        epoch: any integer, likewise.
        n: how many words.

    Returns:
        Array (n,) of uint64.
    """
    key = np.array([_lowest(seed), _lowest(epoch)], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(n)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return a random order of `n` items, a pure function of (seed, epoch, n).

    Every item gets a random key and the keys are sorted. Key and item share one word (the item in
    the lowest bits), so all words differ, any sorting algorithm gives the same order, and numpy's
    vectorised sort can be used: 1.0 ms for 60,000 items, argsort 4.6 ms.

    Args:
        seed: the loader's seed.
        epoch: the number of the pass over the data.
        n: the number of items, below 2**32.

    Returns:
        Array (n,) of int64, each of 0 .. n-1 once.
    """
    low = np.uint64((1 << max(n - 1, 1).bit_length()) - 1)
    keys = (words(seed, epoch, n) & ~low) | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)


def uniforms(seed: int, epoch: int, items: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    """Return `n` numbers from 0 to 1 for each item, a row a pure function of (seed, epoch, item).

    So an item is given the same numbers in whatever batch, order, process or rank it comes, and
    asking for more numbers leaves the first ones as they were. The seed is the key of the
    generator; item, epoch and the number of the block of four are its counter: nothing is mixed,
    so no two of them can collide. 0.15 ms for 128 items of 12 numbers.

    Args:
        seed: any integer; its lowest 64 bits count.
        epoch: any integer; its lowest 32 bits count.
        items: (m,) of the items' numbers in the data set, int64.
        n: how many for each item.

    Returns:
        Array (m, n) of float32, multiples of 2**-24 in [0, 1).
    """
    of = np.asarray(items, dtype=np.int64).view(np.uint64)[:, None]
    blocks = -(-n // 4)
    counter = np.empty((4, len(of), blocks), dtype=np.uint64)
    counter[0], counter[1] = of & _LOW, of >> np.uint64(32)
    counter[2], counter[3] = _lowest(epoch) & int(_LOW), np.arange(blocks)
    drawn = (
        philox4x32(counter, _lowest(seed)).transpose(1, 2, 0).reshape(len(of), 4 * blocks)[:, :n]
    )
    return (drawn >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Return the blocks of Philox4x32-10 (Salmon et al., 2011), for many counters at once.

    Args:
        counter: (4, ...) of uint64 below 2**32, the four words of each counter.
        key: 64 bits, the first word of the key the lowest.

    Returns:
        Array like `counter`: four random 32-bit words for each counter.
    """
    ones = (2,) + (1,) * (counter.ndim - 1)
    multipliers, steps = _MULTIPLIERS.reshape(ones), _KEY_STEPS.reshape(ones)
    keys = np.array([key & int(_LOW), key >> 32], dtype=np.uint64).reshape(ones)
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2 are multiplied, 1 and 3 added
    for _ in range(10):
        product = (even * multipliers)[::-1]  # each half of the block feeds the other
        even, odd = (product >> np.uint64(32)) ^ odd ^ keys, product & _LOW
        keys = (keys + steps) & _LOW
    words = np.empty_like(counter)
    words[0::2], words[1::2] = even, odd
    return words
