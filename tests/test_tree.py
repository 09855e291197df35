"""Nested batches: map, move, join, count, split and describe."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pellucid.errors import DataError
from pellucid.tree import describe, join, leaves, map_leaves, n_items, split, to_device

Pair = namedtuple("Pair", "image label")

CPU, META = torch.device("cpu"), torch.device("meta")

nested = st.recursive(
    st.integers(),
    lambda parts: (
        st.lists(parts, max_size=3)
        | st.lists(parts, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abcd"), parts, max_size=3)
        | st.tuples(parts, parts).map(lambda pair: Pair(*pair))
    ),
    max_leaves=8,
)


@given(nested)
@settings(deadline=None, max_examples=80)
def test_mapping_keeps_the_structure(tree):
    same = map_leaves(lambda leaf: leaf, tree)
    assert same == tree and repr(same) == repr(tree)
    assert leaves(map_leaves(lambda leaf: leaf + 1, tree)) == [leaf + 1 for leaf in leaves(tree)]


def test_mapping_keeps_the_types_of_containers():
    tree = OrderedDict(a=Pair(1, [2, (3,)]), b={"c": 4})
    doubled = map_leaves(lambda leaf: leaf * 2, tree)
    assert type(doubled) is OrderedDict and type(doubled["a"]) is Pair
    assert doubled == OrderedDict(a=Pair(2, [4, (6,)]), b={"c": 8})


def test_leaves_come_in_order():
    assert leaves({"a": (1, [2, 3]), "b": 4}) == [1, 2, 3, 4]


def test_moving_takes_every_tensor_and_leaves_the_rest():
    tree = {"x": (tensor([1.0]), "text"), "y": Pair([tensor(2)], None)}
    moved = to_device(tree, META)
    assert moved["x"][0].device == moved["y"].image[0].device == META
    assert moved["x"][1] == "text" and moved["y"].label is None


def test_the_host_waits_for_what_it_will_read_and_for_all_devices_but_cuda():
    """Torch copies to pinned memory without waiting, if it may: too early a reader sees rubbish.

    And from ordinary memory; CUDA keeps it apart before it goes on, others may read it too late.
    """

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            waits.append(not kwargs.get("non_blocking", False))
            return torch.zeros(args[0].shape, device=kwargs["device"])

    waits = []
    host, away = torch.zeros(2), torch.zeros(2, device=META)
    with Copies():
        to_device(away, CPU)
        to_device(host, META)
    assert waits == [True, True]


def test_moving_to_where_it_is_copies_nothing():
    x, y = torch.ones(3), torch.zeros(3)
    batch = to_device((x, {"y": y}), CPU)
    assert batch[0] is x and batch[1]["y"] is y


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: a,
        lambda a, b: (a, b),
        lambda a, b: {"a": a, "b": (b, a)},
        lambda a, b: ((a,), (b, (a, b))),
    ],
)
def test_joined_slices_are_the_whole(make):
    a, b = torch.randn(7, 2), torch.arange(7)
    whole = join([make(a[:3], b[:3]), make(a[3:4], b[3:4]), make(a[4:], b[4:])])
    assert describe(whole) == describe(make(a, b))
    for found, expected in zip(leaves(whole), leaves(make(a, b)), strict=True):
        assert torch.equal(found, expected)


def test_joining_keeps_the_types_of_containers():
    whole = join([Pair(tensor([1]), {"a": tensor([2])}), Pair(tensor([3]), {"a": tensor([4])})])
    assert type(whole) is Pair and whole.label["a"].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("batch", "n"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.zeros(4, 2), torch.zeros(4)), 4),
        ({"scale": tensor(2.0), "x": torch.zeros(3, 1)}, 3),
        ([["names"], Pair(torch.zeros(6, 1), None)], 6),
        (torch.zeros(0, 2), 0),
    ],
)
def test_the_first_tensor_with_dimensions_counts_the_items(batch, n):
    assert n_items(batch) == n


@pytest.mark.parametrize("batch", [tensor(1.0), (tensor(1.0), "text"), [], None, "text"])
def test_a_batch_that_cannot_be_counted_is_an_error(batch):
    with pytest.raises(DataError, match="no tensor whose first dimension"):
        n_items(batch)


A, B, C, D = (tensor([i]) for i in range(4))


@pytest.mark.parametrize(
    ("batch", "n_inputs", "inputs", "targets"),
    [
        (A, 1, A, None),
        ((A,), 1, A, None),
        ((A, B), 1, A, B),
        ([A, B], 1, A, B),
        ((A, B, C), 1, A, (B, C)),
        ((A, B, C), 2, (A, B), C),
        ([A, B, C], 2, (A, B), C),
        ((A, B, C, D), 2, (A, B), (C, D)),
        ((A, B), 2, (A, B), None),
        ((A, {"boxes": B}), 1, A, {"boxes": B}),
        (((A, B), C), 1, (A, B), C),
        ({"x": A, "y": B}, 1, {"x": A}, B),
        ({"x": A, "z": B, "y": C}, 2, {"x": A, "z": B}, C),
        ({"x": A, "y": B, "z": C}, 1, {"x": A}, {"y": B, "z": C}),
        ({"x": A}, 1, {"x": A}, None),
    ],
)
def test_a_batch_is_split_into_inputs_and_targets(batch, n_inputs, inputs, targets):
    x, y = split(batch, n_inputs)
    assert repr((x, y)) == repr((inputs, targets))


def test_a_named_tuple_is_split_by_its_fields():
    assert split(Pair(A, B), 1) == (A, B)
    x, y = split(Pair(A, B), 2)
    assert tuple(x) == (A, B) and y is None


@pytest.mark.parametrize(("batch", "n_inputs"), [((A,), 2), (A, 2), ({"x": A}, 2), ((), 1), (3, 1)])
def test_a_batch_with_too_few_parts_is_an_error_that_describes_it(batch, n_inputs):
    with pytest.raises(DataError) as caught:
        split(batch, n_inputs)
    assert describe(batch) in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (torch.zeros(64, 1, 28, 28, dtype=torch.uint8), "uint8 64×1×28×28"),
        (tensor(1.0), "float32 scalar"),
        ((torch.zeros(2, 3), torch.zeros(2).long()), "(float32 2×3, int64 2)"),
        ({"x": tensor([True]), "y": [None, "text"]}, "{x: bool 1, y: (nothing, str)}"),
        (Pair(A, 3), "(int64 1, int)"),
        ((), "()"),
    ],
)
def test_a_batch_is_described_in_one_line(tree, line):
    assert describe(tree) == line
