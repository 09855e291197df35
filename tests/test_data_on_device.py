"""Data on the device: the same batches, and nothing goes there but the order, once an epoch."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from pellucid import DataLoaders, Learner, Loader
from pellucid.callbacks import BatchSize, Progress
from pellucid.data import ArrayDataset, Normalize
from pellucid.data.decoded import DecodedImages
from pellucid.errors import SetupError
from pellucid.schedules import linear
from pellucid.vision import AlternatingFlip, RandomErasing, simple_cnn
from pellucid.vision.augment import Augment

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Moves(TorchDispatchMode):
    """Count what goes from one device to another, or is copied on one."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "clone", "_local_scalar_dense"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def images(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return x, torch.randint(10, (n,), generator=generator)


def loaders(n: int = 50, n_valid: int = 21, batch_size: int = 8) -> DataLoaders:
    return DataLoaders.from_arrays(images(n), images(n_valid, 1), batch_size, classes=10)


def all_of(data: DataLoaders, epochs: int = 2) -> list[torch.Tensor]:
    """Return every tensor of the batches of some epochs, and of validation."""
    batches = [batch for _ in range(epochs) for batch in data.train]
    return [tensor.cpu() for batch in [*batches, *data.valid] for tensor in batch]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ── what is moved ─────────────────────────────────────────────────────────────────────────────


def test_only_the_order_moves_and_once_an_epoch():
    data = loaders().to("meta")  # a device without memory: what goes there is counted all the same
    for _ in range(2):
        with Moves() as moves:
            batches = list(data.train)
        assert moves.counts == {"_to_copy": 1}
        assert len(batches) == 7
        assert all(x.is_meta and y.is_meta for x, y in batches)
        assert [len(x) for x, _ in batches] == [8] * 6 + [2]


def test_on_its_own_device_nothing_is_copied():
    data = loaders().to("cpu")
    with Moves() as moves:
        list(data.train), list(data.valid)
    assert moves.counts == {}


def test_the_labels_of_many_batches_are_gathered_at_once_there_too(monkeypatch):
    class Gathers(Moves):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.counts[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    data = loaders().to("meta")
    with Gathers() as gathers:
        list(data.train)
    assert gathers.counts["index_select"] == 7 + 1


# ── the batches are the same ──────────────────────────────────────────────────────────────────


@given(n=st.integers(1, 40), n_valid=st.integers(1, 20), batch_size=st.integers(1, 50))
def test_batches_are_those_of_the_host(n, n_valid, batch_size):
    moved = loaders(n, n_valid, batch_size)
    assert moved.to("cpu") is moved
    assert_same(all_of(moved), all_of(loaders(n, n_valid, batch_size)))


def test_arrays_may_lie_apart():
    x, y = images(20)
    dataset = ArrayDataset(x, y.to("meta"))
    batches = list(dataset.batches(torch.arange(20).flip(0), 8))
    assert_same([batch[0] for batch in batches], list(x.flip(0).split(8)))
    assert all(batch[1].is_meta for batch in batches)


def test_a_data_set_of_ones_own_stays_one():
    class Doubled(ArrayDataset):
        def batches(self, order, size):
            return ((2 * x, y) for x, y in super().batches(order, size))

    x, y = images(20)
    data = DataLoaders(Loader(Doubled(x, y), 8), classes=10)
    there = list(data.to("cpu").train)
    assert_same([batch[0] for batch in there], list((2 * x).split(8)))
    before = data.train.dataset
    assert all(batch[0].is_meta for batch in data.to("meta").train)
    assert before.arrays[0].is_cpu  # who holds the data set keeps it


def test_decoded_images_move_their_own_items_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    items = torch.tensor([3, 17, 5, 8])
    whole = DecodedImages(pixels, torch.arange(20), items)
    assert whole.to("cpu") is whole  # and not a second time in memory
    moved = whole.to("meta")
    assert len(moved) == 4
    assert [array.shape[0] for array in moved._all.arrays] == [4, 4]
    x, y = next(moved.batches(torch.tensor([2, 0]), 2))
    assert (x.shape, x.is_meta, y.is_meta) == ((2, 3, 4, 4), True, True)


def test_those_items_are_the_right_ones(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    whole = DecodedImages(pixels, torch.arange(20), torch.tensor([3, 17, 5, 8]))
    there = ArrayDataset.to
    monkeypatch.setattr(ArrayDataset, "to", lambda self, device: there(self, "cpu"))
    moved = whole.to("meta")  # to the other device, which is the CPU here
    order = torch.tensor([2, 0, 3, 1])
    for ours, theirs in zip(moved.batches(order, 3), whole.batches(order, 3), strict=True):
        assert_same(list(ours), list(theirs))


# ── what is said ──────────────────────────────────────────────────────────────────────────────


def test_it_says_what_lies_where():
    assert "MB" not in repr(loaders())
    megabytes = 50 * (3 * 8 * 8 + 8) / 1e6
    assert f"{megabytes:,.1f} MB on meta" in repr(loaders(50).to("meta"))
    assert loaders(50).train.dataset.nbytes == 50 * (3 * 8 * 8 + 8)


@pytest.mark.parametrize("what", ["list", "torch", "items"])
def test_what_is_no_array_is_refused_and_nothing_moves(what):
    x, y = images(20)
    others = {
        "list": [(x, y)],
        "torch": DataLoader(TensorDataset(x, y), 4),
        "items": Loader(list(zip(x, y, strict=True)), 4),
    }
    data = DataLoaders(Loader(ArrayDataset(x, y), 4), others[what], classes=10)
    with pytest.raises(SetupError, match="Only arrays in memory"):
        data.to("meta")
    assert data.train.dataset.arrays[0].is_cpu


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SetupError, match="cannot be used"):
        loaders().to("cuda:77")


def test_data_that_do_not_fit_are_said_to_be(monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    data = loaders()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000_000, 8_000_000))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", full)
        with pytest.raises(SetupError, match=r"(?s)do not fit on meta.*0\.0 MB wanted, 5\.0 free"):
            data.train.dataset.to("meta")


# ── in a fit ──────────────────────────────────────────────────────────────────────────────────


def fitted(data: DataLoaders, device: str) -> Learner:
    torch.manual_seed(0)
    model = simple_cnn(3, 10, widths=(4, 8))
    data.augment = [AlternatingFlip(data.train), Augment(shift=0.1), RandomErasing()]
    learn = Learner(model, data, device=device, callbacks=[Progress("off")])
    learn.fit(2, callbacks=[BatchSize(linear(8, 16))])
    return learn


def test_a_fit_is_the_same():
    one, other = fitted(loaders(), "cpu"), fitted(loaders().to("cpu"), "cpu")
    assert one.record.batches["train/loss"].tolist() == other.record.batches["train/loss"].tolist()


@needs_gpu
def test_batches_gathered_on_the_gpu_are_those_of_the_host():
    assert_same(all_of(loaders().to("cuda")), all_of(loaders()))
    x, y = next(iter(loaders().to("cuda").train))
    assert x.is_cuda and y.is_cuda


@needs_gpu
def test_on_the_gpu_nobody_waits():
    data = loaders().to("cuda")
    data.augment = [AlternatingFlip(data.train), Augment(shift=0.1, flip=0.5), RandomErasing()]
    for x, _ in data.train:  # what is set up once, the statistics of Normalize for one
        data.prepare(x, training=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, _ in data.train:
            data.prepare(x, training=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_fit_on_the_gpu_is_the_same():
    one, other = fitted(loaders(), "cuda"), fitted(loaders().to("cuda"), "cuda")
    assert one.record.batches["train/loss"].tolist() == other.record.batches["train/loss"].tolist()


@needs_gpu
def test_data_on_the_gpu_can_be_shown_and_measured():
    data = loaders().to("cuda")
    data.show_batch(4)
    Normalize.of(data.train.dataset.arrays[0])
