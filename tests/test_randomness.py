"""Randomness as a function: of (seed, epoch, n) and of nothing else."""

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.device import seed_everything
from pellucid.errors import SetupError
from pellucid.randomness import permutation, philox4x32, uniforms, words

any_integer = st.integers(-(2**70), 2**70)


@given(seed=any_integer, epoch=st.integers(0, 2**64), n=st.integers(0, 3000))
@settings(deadline=None, max_examples=100)
def test_a_permutation_has_every_item_once(seed, epoch, n):
    order = permutation(seed, epoch, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 255, 256, 257, 65_535, 65_536, 65_537])
def test_a_permutation_is_whole_around_powers_of_two(n):
    assert np.array_equal(np.sort(permutation(3, 1, n)), np.arange(n))


@given(seed=any_integer, epoch=st.integers(0, 1000), n=st.integers(0, 300))
@settings(deadline=None, max_examples=40)
def test_a_permutation_depends_on_seed_epoch_and_length_alone(seed, epoch, n):
    first = permutation(seed, epoch, n)
    permutation(seed + 1, epoch, n)
    np.random.random(3)
    torch.rand(3)
    assert np.array_equal(permutation(seed, epoch, n), first)


GOLDEN = {
    (0, 0, 10): "c57be815709fd76464b0df95c23862da02bcbf45e1fb39d7d29dc376b852a323",
    (0, 1, 10): "e15655f969681fab60a7e97143e42d4ea520cf92d68e063b225af51c3339b5dd",
    (1, 0, 10): "c794b8894e2acecc264f04e90cf50ec40bed6f1805ac1056eaeb3a4d71ec2606",
    (-1, 2**40, 1000): "ac1b3e4da2faa88ac168a52fb804061342db6fc10318f3aa053bfc212843f6b3",
    (42, 7, 60_000): "368804a8fa8096ee50edc0cdb658d6a09902d965f486f4e67873e83d4406aae6",
}


@pytest.mark.parametrize("of", GOLDEN)
def test_a_permutation_is_the_same_on_every_machine(of):
    # integers all the way: a difference is a change of meaning, and breaks every resumed run
    digest = hashlib.sha256(permutation(*of).astype("<i8").tobytes()).hexdigest()
    assert digest == GOLDEN[of]


def test_the_words_are_the_raw_words_of_philox():
    expected = np.random.Philox(key=[5, 9]).random_raw(4)
    assert np.array_equal(words(5, 9, 4), expected)
    assert np.array_equal(words(5 + 2**64, 9, 4), expected)


def test_other_seeds_and_epochs_give_other_orders():
    orders = {permutation(s, e, 50).tobytes() for s in range(20) for e in range(20)}
    assert len(orders) == 400


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # see the assertion
@pytest.mark.parametrize("seeds", [(-1, -2), (2**63, 2**63 + 1), (0, -1)])
def test_neighbouring_seeds_differ_at_the_far_ends_too(seeds):
    assert not np.array_equal(*(permutation(seed, 0, 1000) for seed in seeds))


@pytest.mark.parametrize("by_epoch", [True, False])
@pytest.mark.parametrize("n", [3, 5, 8])
def test_every_item_comes_everywhere_equally_often(n, by_epoch):
    rounds = 4000
    counts = np.zeros((n, n))
    for i in range(rounds):
        order = permutation(0, i, n) if by_epoch else permutation(i, 0, n)
        counts[np.arange(n), order] += 1
    chi_square = ((counts - rounds / n) ** 2 / (rounds / n)).sum()
    # (n - 1)² degrees of freedom: the mean, and six standard deviations above it
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5


def test_all_orders_of_three_come_equally_often():
    rounds = 6000
    found = [permutation(1, i, 3).tobytes() for i in range(rounds)]
    counts = [found.count(order) for order in set(found)]
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 5 + 6 * 10**0.5


def test_the_global_generators_are_neither_read_nor_moved():
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    permutation(0, 0, 1000)
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    assert before == after


def test_one_switch_seeds_everything():
    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    seed_everything(3)
    first = drawn()
    assert drawn() != first
    seed_everything(3)
    assert drawn() == first
    seed_everything(4)
    assert drawn() != first


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(SetupError, match="between 0 and"):
        seed_everything(seed)


@pytest.mark.parametrize("seed", ["1", 1.5, None])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(SetupError, match="A seed is a whole number"):
        seed_everything(seed)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32, torch.tensor])
def test_numbers_of_numpy_are_numbers(kind):
    assert np.array_equal(permutation(kind(7), kind(3), 50), permutation(7, 3, 50))
    assert np.array_equal(uniforms(kind(7), kind(3), [1, 2], 5), uniforms(7, 3, [1, 2], 5))
    assert np.array_equal(words(np.int64(-7), np.int64(-1), 5), words(-7, -1, 5))
    seed_everything(kind(7))
    first = torch.rand(1)
    seed_everything(7)
    assert torch.equal(torch.rand(1), first)


# ── draws for each item ───────────────────────────────────────────────────────────────────────

KNOWN_ANSWERS = {  # kat_vectors of Random123, the authors' own library: counter, key, block
    "zeros": ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(name):
    counter, key, block = map(hexes, KNOWN_ANSWERS[name])
    counters = np.array([counter, [0, 1, 2, 3], counter], dtype=np.uint64).T  # many at once
    words = philox4x32(counters, key[0] | key[1] << 32)
    assert words[:, 0].tolist() == words[:, 2].tolist() == block
    assert words.max() < 2**32


def test_seed_epoch_item_and_block_each_have_their_place_in_philox():
    seed, epoch, item = 0x299F31D0_A4093822, 0x13198A2E, 0x05A308D3_243F6A88
    row = uniforms(seed, epoch, [item], 8)[0]
    blocks = [[0x243F6A88, 0x05A308D3, epoch, block] for block in (0, 1)]
    words = philox4x32(np.array(blocks, dtype=np.uint64).T, seed).T.ravel()
    assert row.tolist() == [(word >> 8) / 2**24 for word in words.tolist()]


@given(
    seed=any_integer,
    epoch=st.integers(0, 2**32 - 1),
    items=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20),
    n=st.integers(0, 17),
    cut=st.integers(0, 20),
)
@settings(deadline=None, max_examples=60)
def test_a_row_belongs_to_its_item_in_any_batch(seed, epoch, items, n, cut):
    rows = uniforms(seed, epoch, items, n)
    assert (rows.shape, rows.dtype) == ((len(items), n), np.float32)
    parts = [uniforms(seed, epoch, part, n) for part in (items[:cut], items[cut:])]
    assert np.array_equal(np.concatenate(parts), rows)
    assert np.array_equal(uniforms(seed, epoch, np.array(items[::-1]), n), rows[::-1])
    assert np.array_equal(uniforms(seed, epoch, items, n + 3)[:, :n], rows)
    assert ((rows >= 0) & (rows < 1)).all()


@pytest.mark.parametrize("bit", [0, 1, 23, 31, 32, 47, 63])
def test_every_bit_of_seed_and_item_counts(bit):
    here = uniforms(5, 2, [9], 8)
    assert not np.array_equal(uniforms(5 ^ 1 << bit, 2, [9], 8), here)
    assert bit == 63 or not np.array_equal(uniforms(5, 2, [9 ^ 1 << bit], 8), here)
    assert bit >= 32 or not np.array_equal(uniforms(5, 2 ^ 1 << bit, [9], 8), here)


def test_no_two_rows_are_alike():
    of = [(seed, epoch) for seed in range(10) for epoch in range(10)]
    rows = np.concatenate([uniforms(*at, range(100), 2) for at in of])
    assert len(np.unique(rows, axis=0)) == 10_000


@pytest.mark.parametrize("by", ["item", "epoch", "seed"])
def test_draws_are_even_and_neighbours_have_nothing_in_common(by):
    if by == "item":
        drawn = uniforms(1, 2, range(20_000), 5)
    else:
        at = [(1, i) if by == "epoch" else (i, 1) for i in range(4000)]
        drawn = np.concatenate([uniforms(*pair, [7], 5) for pair in at])
    n = len(drawn)
    for column in drawn.T:
        counts = np.histogram(column, 16, (0, 1))[0]
        assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 15 + 6 * 30**0.5
    neighbours = np.concatenate([drawn[:-1], drawn[1:]], axis=1)
    correlation = np.corrcoef(neighbours.T) - np.eye(10)
    assert np.abs(correlation).max() < 5 / n**0.5


def test_draws_are_the_same_on_every_machine():
    drawn = uniforms(42, 7, np.arange(1000) * 10**15, 13)
    digest = hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest()
    assert digest == "f5f8dbd5b27244da20dabedb63b2a4aaedba0b0040d23663508986c2c2a15a28"


def test_draws_leave_the_global_generators_alone():
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    uniforms(0, 0, range(100), 13)
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    assert before == after
