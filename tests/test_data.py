"""Data: sets, loaders against a plain list, named sets and their files."""

import gzip
import hashlib
import math
from itertools import chain, islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.utils.data import DataLoader as TorchLoader

from pellucid import DataLoaders, Loader
from pellucid.data import (
    ArrayDataset,
    Normalize,
    Reshape,
    check_length,
    digits,
    fashion_mnist,
    first,
    length,
    mnist,
    named,
)
from pellucid.data.named import cifar10, read_idx
from pellucid.errors import DataError, DataNotFound, SetupError, UnknownName
from pellucid.losses import mean_squared_error

# ── sets of arrays ──────────────────────────────────────────────────────────────────────────────


def test_an_array_data_set_gives_items_slices_and_many_by_index():
    x, y = np.arange(12.0).reshape(6, 2), [3, 1, 4, 1, 5, 9]
    dataset = ArrayDataset(x, tensor(y))
    assert len(dataset) == 6
    assert [part.tolist() for part in dataset[2]] == [[4.0, 5.0], 4]
    assert [part.shape for part in dataset[0:5]] == [(5, 2), (5,)]
    assert dataset[tensor([5, 0])][1].tolist() == [9, 3]
    assert [int(label) for _, label in dataset] == y
    assert repr(dataset) == "ArrayDataset(float64 6×2, int64 6)"


def test_an_array_data_set_copies_nothing_and_keeps_dtypes():
    x = np.zeros((4, 3), np.uint8)
    dataset = ArrayDataset(x)
    x[0] = 7
    assert dataset[0][0].tolist() == [7, 7, 7] and dataset[0][0].dtype == torch.uint8


@pytest.mark.parametrize("arrays", [(), (np.zeros(3), np.zeros(4)), (np.zeros(3), np.zeros(()))])
def test_arrays_of_different_lengths_are_refused(arrays):
    with pytest.raises(DataError, match="same number of items"):
        ArrayDataset(*arrays)


def test_numbers_that_count_no_items_are_refused():
    with pytest.raises(DataError):
        ArrayDataset(np.zeros(()), np.zeros(()))


# ── the loader against a plain list ─────────────────────────────────────────────────────────────


class Letters:
    """A data set of the plainest kind: a length and items of several sorts."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        return {"number": i, "square": tensor([i, i * i]), "name": f"item {i}"}


def by_list(order, size, drop_last):
    """What a loader is: a list cut into pieces."""
    pieces = [order[i : i + size] for i in range(0, len(order), size)]
    return [piece for piece in pieces if len(piece) == size or not drop_last]


loaders = {
    "n": st.integers(1, 200),
    "size": st.integers(1, 70),
    "drop_last": st.booleans(),
    "shuffle": st.booleans(),
    "seed": st.integers(0, 2**40),
}


def make(dataset, n, size, drop_last, shuffle, seed):
    if drop_last and n < size:
        size = n
    return Loader(dataset, size, shuffle, drop_last, seed), size


@given(**loaders)
@settings(deadline=None, max_examples=120)
def test_a_loader_over_arrays_is_a_list_cut_into_pieces(n, size, drop_last, shuffle, seed):
    x = torch.arange(n) * 3
    wide = x[:, None].expand(n, 40).contiguous()  # many bytes an item, gathered another way
    loader, size = make(ArrayDataset(wide, x), n, size, drop_last, shuffle, seed)
    for epoch in range(2):
        order = loader.order(epoch).tolist()
        assert sorted(order) == list(range(n))
        assert shuffle or order == list(range(n))
        expected = [[3 * i for i in piece] for piece in by_list(order, size, drop_last)]
        found = list(loader)
        assert [batch[1].tolist() for batch in found] == expected
        assert [batch[0][:, 39].tolist() for batch in found] == expected
        assert len(loader) == len(expected) == (n // size if drop_last else math.ceil(n / size))
        if not drop_last:
            assert sorted(chain(*expected)) == x.tolist()


@given(**(loaders | {"n": st.integers(1, 40)}))
@settings(deadline=None, max_examples=60)
def test_a_loader_over_items_is_a_list_cut_into_pieces(n, size, drop_last, shuffle, seed):
    loader, size = make(Letters(n), n, size, drop_last, shuffle, seed)
    pieces = by_list(loader.order(0).tolist(), size, drop_last)
    for batch, piece in zip(loader, pieces, strict=True):
        assert batch["number"].tolist() == piece
        assert batch["square"].tolist() == [[i, i * i] for i in piece]
        assert batch["name"] == [f"item {i}" for i in piece]


@given(**loaders, start=st.integers(0, 60), epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_an_epoch_can_be_continued_anywhere(n, size, drop_last, shuffle, seed, start, epoch):
    loader, _ = make(ArrayDataset(torch.arange(n)), n, size, drop_last, shuffle, seed)
    whole = [batch.tolist() for (batch,) in loader.batches(epoch)]
    rest = [batch.tolist() for (batch,) in loader.batches(epoch, start)]
    assert rest == whole[start:]
    assert loader.epoch == 0


@pytest.mark.parametrize("sizes", [(70_000, 64), (70_000, 3), (66_000, 65_537), (131_073, 65_536)])
def test_nothing_is_lost_where_one_block_of_labels_ends_and_the_next_begins(sizes):
    n, size = sizes
    loader = Loader(ArrayDataset(torch.arange(n), torch.arange(n).float()), size, shuffle=True)
    found = list(loader)
    assert [len(x) for x, _ in found] == [size] * (n // size) + [n % size] * bool(n % size)
    assert torch.equal(torch.cat([x for x, _ in found]), loader.order(0))
    assert torch.equal(torch.cat([y for _, y in found]).long(), loader.order(0))


def test_the_order_is_new_every_epoch_and_the_same_for_the_same_seed():
    def orders(seed):
        loader = Loader(ArrayDataset(torch.arange(50)), 7, shuffle=True, seed=seed)
        return [torch.cat([x for (x,) in loader]).tolist() for _ in range(3)]

    assert orders(1) == orders(1)
    assert len({str(order) for order in orders(1) + orders(2)}) == 6


def test_validation_comes_in_the_same_order_every_epoch():
    loader = Loader(ArrayDataset(torch.arange(10)), 3)
    for _ in range(3):
        assert [x.tolist() for (x,) in loader] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_a_pass_that_is_left_early_is_over_and_the_next_is_whole():
    loader = Loader(ArrayDataset(torch.arange(20)), 3, shuffle=True)
    for _ in islice(loader, 2):
        pass
    assert loader.epoch == 1
    second = torch.cat([x for (x,) in loader])
    assert torch.equal(second, loader.order(1))
    assert sorted(second.tolist()) == list(range(20))


def test_two_passes_at_once_do_not_disturb_each_other():
    loader = Loader(ArrayDataset(torch.arange(12)), 5, shuffle=True)
    pairs = list(zip(loader, loader, strict=True))
    assert torch.equal(torch.cat([a for (a,), _ in pairs]), loader.order(0))
    assert torch.equal(torch.cat([b for _, (b,) in pairs]), loader.order(1))


def test_first_is_the_next_passes_first_batch_and_changes_nothing():
    loader = Loader(ArrayDataset(torch.arange(20)), 6, shuffle=True)
    for epoch in range(3):
        looked = first(loader)[0].tolist()
        assert first(loader)[0].tolist() == looked
        assert loader.epoch == epoch
        assert next(iter(loader))[0].tolist() == looked
    assert first([1, 2]) == 1


def test_first_takes_one_batch_of_a_data_set_and_no_more():
    class Counting(Letters):
        asked = 0

        def __getitem__(self, i):
            self.asked += 1
            return super().__getitem__(i)

    loader = Loader(Counting(100), 8)
    first(loader)
    assert loader.dataset.asked == 8


def test_a_batch_is_a_copy_of_the_data_set():
    x = torch.zeros(8, 2)
    for shuffle in (True, False):
        for (batch,) in Loader(ArrayDataset(x), 4, shuffle):
            batch += 1
    assert not x.any()


def test_a_batch_of_labels_is_a_copy_of_its_own():
    loader = Loader(ArrayDataset(torch.zeros(8, 9), torch.zeros(8)), 4)
    one, two = (y for _, y in loader)
    one += 1
    assert not two.any() and not loader.dataset.arrays[1].any()


def test_pixels_stay_bytes():
    images = np.full((6, 1, 4, 4), 200, np.uint8)
    x, y = first(Loader(ArrayDataset(images, np.zeros(6, np.int16)), 4, shuffle=True))
    assert x.dtype == torch.uint8 and y.dtype == torch.int16


@pytest.mark.parametrize(
    ("n", "batch_size", "lengths"), [(50_000, 64, (782, 79)), (50_000, 512, (98, 10))]
)
def test_lengths_are_those_of_the_course(n, batch_size, lengths):
    y = torch.zeros(n + 10_000, dtype=torch.uint8)
    data = DataLoaders.from_arrays((y[:n], y[:n]), (y[n:], y[n:]), batch_size, transforms=[])
    assert (len(data.train), len(data.valid)) == lengths
    assert data.valid.batch_size == 2 * batch_size
    assert data.train.shuffle and not data.valid.shuffle


def test_a_loader_gives_what_torchs_loader_gives():
    dataset = ArrayDataset(torch.randn(23, 3), torch.arange(23))
    for drop_last in (True, False):
        ours, torchs = (Loader(dataset, 5, drop_last=drop_last),
                        TorchLoader(dataset, 5, drop_last=drop_last))  # fmt: skip
        assert len(ours) == len(torchs)
        for (a, b), (c, d) in zip(ours, torchs, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)


def test_a_loader_that_can_have_no_batch_is_refused():
    for n, drop_last in ((0, False), (0, True), (3, True)):
        with pytest.raises(DataError, match="The data set has no batch"):
            Loader(ArrayDataset(torch.zeros(n)), 4, drop_last=drop_last)
    for size in (0, -1):
        with pytest.raises(SetupError, match=f"batch_size={size}"):
            Loader(ArrayDataset(torch.zeros(3)), size)


def test_an_error_in_an_item_comes_out_as_it_is():
    class Broken(Letters):
        def __getitem__(self, i):
            if i == 5:
                raise OSError("file 5 is broken")
            return super().__getitem__(i)

    with pytest.raises(OSError, match="file 5 is broken"):
        list(Loader(Broken(8), 2))


def test_loaders_show_what_they_are():
    loader = Loader(ArrayDataset(torch.zeros(9, 2)), 4, shuffle=True, seed=3)
    text = "Loader(3 batches of 4, shuffled, seed 3, from ArrayDataset(float32 9×2))"
    assert repr(loader) == text
    assert repr(DataLoaders(loader, classes=3)) == f"DataLoaders(train={text}, 3 classes)"


def test_length_is_what_a_loader_says_or_none():
    assert length([1, 2]) == 2
    assert length(iter([1])) is None
    check_length(2, 2, "train")
    check_length(2, None, "train")


# ── DataLoaders ─────────────────────────────────────────────────────────────────────────────────


def test_classes_are_inferred_from_integer_targets():
    x, y = torch.randn(6, 2), np.array([0, 2, 1, 2, 0, 1], np.uint8)
    data = DataLoaders.from_arrays((x, y), (x, y), batch_size=2)
    assert data.classes == ["0", "1", "2"] and data.n_classes == 3
    assert data.default_loss() is F.cross_entropy
    assert first(data.train)[1].dtype == first(data.valid)[1].dtype == torch.int64


def test_classes_may_be_named_or_counted():
    x, y = torch.randn(2, 2), tensor([0, 1])
    assert DataLoaders.from_arrays((x, y), classes=5).n_classes == 5
    assert DataLoaders.from_arrays((x, y), classes=("cat", "dog")).classes == ["cat", "dog"]
    assert DataLoaders([(x, y)], classes=2).default_loss() is F.cross_entropy


@pytest.mark.parametrize("part", ["training", "validation"])
@pytest.mark.parametrize("bad", [-1, 3, 255])
def test_a_label_that_is_no_class_is_named(part, bad):
    x, good = torch.randn(4, 2), tensor([0, 1, 2, 0])
    wrong = tensor([0, 1, bad, bad])
    sets = ((x, wrong), (x, good)) if part == "training" else ((x, good), (x, wrong))
    with pytest.raises(DataError, match=f"A label of the {part} data is out of range") as caught:
        DataLoaders.from_arrays(*sets, classes=3)
    assert f"label {bad} at item 2, 2 such in all; there are 3 classes" in str(caught.value)


def test_a_negative_label_is_found_where_classes_are_inferred_too():
    with pytest.raises(DataError, match="label -1 at item 1"):
        DataLoaders.from_arrays((torch.randn(3, 2), tensor([0, -1, 1])))


@pytest.mark.parametrize("targets", [torch.zeros(4), torch.zeros(4, 3).long()])
def test_targets_that_are_no_labels_are_refused_where_classes_are_given(targets):
    with pytest.raises(DataError, match="The training targets are no class numbers"):
        DataLoaders.from_arrays((torch.randn(4, 2), targets), classes=3)


def test_validation_targets_of_another_kind_are_refused():
    x = torch.randn(4, 2)
    with pytest.raises(DataError, match="The validation targets are no class numbers"):
        DataLoaders.from_arrays((x, torch.zeros(4).long()), (x, torch.zeros(4)))


@pytest.mark.parametrize("targets", [torch.zeros(4), np.zeros((4, 2), np.float64)])
def test_float_targets_make_a_regression(targets):
    data = DataLoaders.from_arrays((torch.randn(4, 2), targets))
    assert data.classes is None and data.default_loss() is mean_squared_error
    with pytest.raises(SetupError, match="These data have no classes"):
        _ = data.n_classes


def test_targets_that_tell_no_loss_are_refused():
    for data in (
        DataLoaders.from_arrays((torch.randn(4, 2), torch.ones(4, 2).long())),
        DataLoaders([torch.zeros(3, 2)]),
        DataLoaders([(torch.zeros(3), torch.zeros(3).bool())]),
        DataLoaders(iter([(torch.zeros(3), torch.zeros(3))])),
        DataLoaders([]),
    ):
        with pytest.raises(SetupError, match="do not tell which loss"):
            data.default_loss()


def test_asking_for_the_loss_uses_up_no_generator_and_no_epoch():
    batches = [(torch.zeros(2, 1), torch.zeros(2, 1))]
    generator = iter(batches)
    with pytest.raises(SetupError):
        DataLoaders(generator).default_loss()
    assert list(generator) == batches
    data = DataLoaders.from_arrays((torch.zeros(4, 1), torch.zeros(4, 1)))
    data.default_loss()
    assert data.train.epoch == 0


def test_several_input_arrays_are_several_inputs():
    a, b, y = torch.randn(4, 2), torch.randn(4, 3), torch.zeros(4).long()
    data = DataLoaders.from_arrays((a, b, y), batch_size=4)
    assert data.n_inputs == 2 and len(first(data.train)) == 3


def test_pixels_are_normalised_by_the_training_data_unless_said_otherwise():
    images, y = np.arange(96, dtype=np.uint8).reshape(6, 1, 4, 4), np.zeros(6, int)
    [normalize] = DataLoaders.from_arrays((images, y)).transforms
    x = normalize(torch.as_tensor(images))
    assert x.mean().abs() < 1e-5 and x.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert DataLoaders.from_arrays((images, y), transforms=[]).transforms == []
    assert DataLoaders.from_arrays((images / 255, y)).transforms == []


def test_arrays_of_different_lengths_are_refused_with_their_shapes():
    with pytest.raises(DataError, match=r"float32 4×2, int64 3"):
        DataLoaders.from_arrays((torch.zeros(4, 2), torch.zeros(3).long()))


def test_data_without_an_input_are_refused():
    with pytest.raises(SetupError, match="n_inputs=0"):
        DataLoaders([1], n_inputs=0)


# ── transforms ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["transforms", "augment"])
def test_one_function_alone_is_as_good_as_a_list_of_it(name):
    x = torch.arange(6.0).view(3, 2)
    data = DataLoaders([(x, x)], **{name: torch.neg})
    assert getattr(data, name) == [torch.neg]
    setattr(data, name, Reshape(2))
    getattr(data, name).append(torch.neg)
    assert torch.equal(data.prepare(x, training=True), -x)
    for wrong in [None, 3, [torch.neg, None], "flip"]:
        with pytest.raises(SetupError, match=f"`{name}` takes a function"):
            setattr(data, name, wrong)
    assert len(getattr(data, name)) == 2  # what was refused has replaced nothing


@given(
    n=st.integers(2, 20),
    channels=st.integers(1, 4),
    as_bytes=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_normalising_gives_mean_zero_and_deviation_one_by_channel(n, channels, as_bytes, seed):
    source = np.random.default_rng(seed)
    x = torch.from_numpy(source.integers(0, 256, (n, channels, 5, 4), dtype=np.uint8))
    x = x if as_bytes else x.float() / 50 - 2
    z = Normalize.of(x)(x)
    assert z.dtype == torch.float32
    assert z.mean((0, 2, 3)).abs().max() < 1e-4
    assert (z.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_bytes_count_from_zero_to_one_for_mean_and_deviation():
    x = tensor([0, 51, 255], dtype=torch.uint8)
    z = Normalize(0.2, 0.5)(x)
    torch.testing.assert_close(z, tensor([-0.4, 0.0, 1.6]), atol=1e-6, rtol=0)
    torch.testing.assert_close(Normalize(0.2, 0.5)(x.float() / 255), z, atol=1e-6, rtol=0)
    assert x.tolist() == [0, 51, 255]


def test_normalising_can_be_undone():
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    normalize = Normalize.of(images)
    torch.testing.assert_close(normalize.undo(normalize(images)), images / 255)


def test_statistics_follow_the_batch_to_its_device_and_back():
    normalize = Normalize([0.5, 0.4], [0.2, 0.1])
    assert normalize(torch.zeros(1, 2, 3, 3, device="meta")).device.type == "meta"
    normalize = Normalize([0.5, 0.4], [0.2, 0.1])
    assert normalize(torch.zeros(1, 2, 3, 3)).device.type == "cpu"


def test_what_is_no_image_is_normalised_by_one_number():
    x = torch.randn(500, 3) * tensor([1.0, 2.0, 3.0])
    normalize = Normalize.of(x)
    assert normalize.mean.ndim == 0
    assert normalize(x).std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("std", [0, -1, [1, 0], float("nan")])
def test_a_deviation_that_cannot_divide_is_refused(std):
    with pytest.raises(SetupError, match="must be above 0"):
        Normalize(0, std)


def test_constant_pixels_are_refused_when_the_statistics_are_taken():
    with pytest.raises(SetupError, match="must be above 0"):
        Normalize.of(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8))


def test_reshape_makes_images_of_rows_also_of_a_short_batch():
    reshape = Reshape(1, 28, 28)
    for n in (512, 336, 1):
        assert reshape(torch.zeros(n, 784)).shape == (n, 1, 28, 28)
    assert repr(reshape) == "Reshape(1, 28, 28)"


# ── named sets ──────────────────────────────────────────────────────────────────────────────────


def test_digits_come_with_the_package_always_split_the_same():
    data = digits()
    (x, y), (vx, vy) = (loader.dataset.arrays for loader in (data.train, data.valid))
    assert (x.shape, vx.shape) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    assert x.dtype == torch.uint8 and int(x.max()) == 16
    assert data.classes == list("0123456789")
    assert y.bincount().min() > 100 and vy.bincount(minlength=10).min() > 20
    again = digits(batch_size=7, seed=5)
    for loader, other in ((data.train, again.train), (data.valid, again.valid)):
        for a, b in zip(loader.dataset.arrays, other.dataset.arrays, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(data.train.order(0), again.train.order(0))
    digest = hashlib.sha256(vx.numpy().tobytes() + vy.numpy().astype("u1").tobytes()).hexdigest()
    assert digest == "817b219b927e38f2ca60212aa0d4d0ee26f4801731c8add2fa8e1eea1feed3cf"


@pytest.fixture(scope="module")
def course():
    """MNIST in the course's split, read once."""
    loaded = []

    def load():
        if not loaded:
            loaded.append(mnist(split="course"))
        return loaded[0]

    return load


def test_mnist_in_the_courses_split_has_the_courses_numbers(real_data, course):
    data = course()
    (x, y), (vx, vy) = (loader.dataset.arrays for loader in (data.train, data.valid))
    assert (x.shape, vx.shape) == ((50_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert y[:5].tolist() == [5, 0, 4, 1, 9] and int(vy[0]) == 3
    assert y.dtype == torch.int64 and int(y.max()) + 1 == data.n_classes == 10
    pixels = x.double()
    mean, std = pixels.mean().item(), pixels.std().item()
    # the course's file held x / 256, which its printed numbers are of
    assert [mean / 256, std / 256] == pytest.approx([0.1304, 0.3073], abs=5e-5)
    assert [mean / 255, std / 255] == pytest.approx([0.1310, 0.3085], abs=5e-5)
    assert (len(data.train), len(data.valid)) == (782, 79)


def test_mnist_is_normalised_by_its_training_part_alone(real_data, course):
    data = course()
    [normalize] = data.transforms
    train, valid = (normalize(loader.dataset.arrays[0]) for loader in (data.train, data.valid))
    assert train.double().mean().abs() < 1e-4
    assert train.double().std().item() == pytest.approx(1.0, abs=1e-4)
    assert valid.double().mean().item() == pytest.approx(-0.0058, abs=1e-4)
    assert valid.double().std().item() == pytest.approx(0.9924, abs=1e-4)


def test_mnist_has_its_official_split_too(real_data):
    data = mnist(batch_size=512)
    assert len(data.train.dataset) == 60_000 and len(data.valid.dataset) == 10_000
    assert data.valid.dataset.arrays[1][:5].tolist() == [7, 2, 1, 0, 4]


def test_fashion_mnist_has_its_classes(real_data):
    data = fashion_mnist()
    x, y = data.train.dataset.arrays
    assert x.shape == (60_000, 1, 28, 28) and len(data.valid.dataset) == 10_000
    assert y[:5].tolist() == [9, 0, 0, 3, 0] and data.classes[9] == "ankle boot"
    assert y.bincount().tolist() == [6000] * 10


FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte",
         "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]  # fmt: skip


def idx(array):
    shape = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """A small MNIST, packed: 6 images to train on, 4 to test."""
    for name, n in zip(FILES, (6, 6, 4, 4), strict=True):
        shape = (n, 3, 2) if "images" in name else (n,)
        array = (np.arange(math.prod(shape)) % 10).astype(np.uint8).reshape(shape)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_not(folder, packed):
    if not packed:
        for file in list(folder.iterdir()):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
    data = mnist(path=folder)
    x, y = data.train.dataset.arrays
    assert x.shape == (6, 1, 3, 2) and y.tolist() == [0, 1, 2, 3, 4, 5]
    assert x.flatten().tolist() == [i % 10 for i in range(36)]


def test_a_data_set_is_found_by_environment_variable_and_in_the_cache(folder, monkeypatch):
    files = list(folder.iterdir())
    for variable, place in (("PELLUCID_DATA", "mnist"), ("PELLUCID_HOME", "data/mnist")):
        monkeypatch.delenv("PELLUCID_DATA", raising=False)
        home = folder / variable
        (home / place).mkdir(parents=True)
        for file in files:
            (home / place / file.name).write_bytes(file.read_bytes())
        monkeypatch.setenv(variable, str(home))
        assert len(mnist().train.dataset) == 6


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: gzip.compress(gzip.decompress(content)[:-1]),
        lambda content: gzip.compress(gzip.decompress(content) + b"x"),
        lambda content: gzip.compress(b"\x01" + gzip.decompress(content)[1:]),
        lambda content: gzip.compress(gzip.decompress(content)[:3]),
        lambda content: gzip.compress(b"\0\0\x08\x03\0\0"),
        lambda content: b"<html>not found</html>",
    ],
)
def test_a_broken_file_is_named(folder, spoil):
    file = folder / f"{FILES[0]}.gz"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DataError, match="is broken") as caught:
        mnist(path=folder)
    assert str(file) in str(caught.value) and "remove it, and fetch it again" in str(caught.value)


def test_a_flipped_byte_anywhere_in_a_packed_file_is_found(folder):
    file = folder / f"{FILES[0]}.gz"
    good, images = file.read_bytes(), read_idx(file)
    for i in range(len(good)):
        file.write_bytes(good[:i] + bytes([good[i] ^ 255]) + good[i + 1 :])
        try:
            found = read_idx(file)
        except DataError:
            continue
        assert i < 10 and np.array_equal(found, images)  # gzip's head has idle bytes


def test_files_that_do_not_belong_together_are_refused(folder):
    labels = folder / f"{FILES[3]}.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(5, np.uint8))))
    with pytest.raises(DataError, match="The test files of mnist do not belong together"):
        mnist(path=folder)


def test_a_split_nobody_knows_is_refused(folder):
    with pytest.raises(UnknownName, match="did you mean 'official'"):
        mnist(path=folder, split="offical")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without data sets and without a network."""

    def fails(name, force):
        raise DataNotFound("The file could not be downloaded.", saw="no route to host")

    monkeypatch.delenv("PELLUCID_DATA", raising=False)
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(named, "fetch_dataset", fails)
    real = named.Path

    def hide_debian(*parts):
        here = real(*parts)
        return tmp_path / "no-debian" if "/usr/share" in str(here) else here

    monkeypatch.setattr(named, "Path", hide_debian)
    return tmp_path


@pytest.mark.parametrize(
    ("load", "name"), [(mnist, "mnist"), (fashion_mnist, "fashion-mnist"), (cifar10, "cifar10")]
)
def test_a_data_set_that_is_nowhere_names_four_ways_to_get_it(nowhere, load, name):
    with pytest.raises(DataNotFound) as caught:
        load()
    text = str(caught.value)
    assert f"{name} is not on this machine" in text
    assert "The file could not be downloaded. no route to host" in text
    assert str(nowhere / "home" / "data" / name) in text
    ways = text.split("do:  ")[1].split("; or ")
    assert len(ways) == 4
    assert "path=" in ways[0] and "PELLUCID_DATA" in ways[1] and "let this machine reach" in ways[3]
    assert isinstance(caught.value, FileNotFoundError)


def test_a_split_nobody_knows_is_refused_before_anything_is_downloaded(nowhere):
    with pytest.raises(UnknownName):
        mnist(split="cuorse")


def test_a_folder_that_was_given_is_not_passed_over_for_a_download(nowhere):
    with pytest.raises(DataNotFound, match="the folder given has not all four files"):
        mnist(path=nowhere)


def test_a_data_set_is_downloaded_into_the_cache_and_then_found_there(
    folder, tmp_path, monkeypatch
):
    cache, asked = tmp_path / "home" / "data" / "mnist", []

    def fetch(name, force):
        asked.append((name, force))
        cache.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            (cache / f"{file}.gz").write_bytes((folder / f"{file}.gz").read_bytes())
        return cache

    monkeypatch.delenv("PELLUCID_DATA", raising=False)
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(named, "fetch_dataset", fetch)
    for _ in range(2):
        assert len(mnist().train.dataset) == 6
    (cache / f"{FILES[1]}.gz").unlink()  # as the message about a broken file says
    assert len(mnist().train.dataset) == 6
    assert asked == [("mnist", False), ("mnist", True)]


CIFAR = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small CIFAR-10: 3 images in each file, red 1, green 2, blue 3, a corner that is theirs."""
    monkeypatch.setattr(named, "_CIFAR_IMAGES", 3)
    for i, name in enumerate(CIFAR):
        images = np.broadcast_to(
            np.array([1, 2, 3], np.uint8)[:, None, None], (3, 3, 32, 32)
        ).copy()
        images[:, :, 0, 31] = (np.arange(3) + 10 * i)[:, None]
        labels = np.array([9, i, 0], np.uint8)
        records = [
            bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True)
        ]
        (tmp_path / name).write_bytes(b"".join(records))
    return tmp_path


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_read_from_its_binary_files(cifar, packed):
    if packed:
        for name in CIFAR:
            (cifar / f"{name}.gz").write_bytes(gzip.compress((cifar / name).read_bytes()))
            (cifar / name).unlink()
    data = cifar10(path=cifar)
    (x, y), (vx, vy) = (loader.dataset.arrays for loader in (data.train, data.valid))
    assert (x.shape, vx.shape, x.dtype) == ((15, 3, 32, 32), (3, 3, 32, 32), torch.uint8)
    assert y.tolist() == [label for i in range(5) for label in (9, i, 0)]
    assert vy.tolist() == [9, 5, 0]
    assert x[:, 1, 0, 31].tolist() == [10 * i + j for i in range(5) for j in range(3)]
    assert x[7, :, 5, 5].tolist() == [1, 2, 3]
    assert data.n_classes == 10 and data.classes[3] == "cat" and data.classes[9] == "truck"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda content: content[:-1], "9,218 bytes, not 9,219"),
        (lambda content: content[:3073], "3,073 bytes"),
        (lambda content: b"", "0 bytes"),
        (lambda content: b"\x0a" + content[1:], "a label 10"),
    ],
    ids=["cut", "one image", "empty", "label"],
)
@pytest.mark.parametrize("name", CIFAR[-2:])
def test_a_broken_file_of_cifar10_is_named(cifar, name, spoil, why):
    (cifar / name).write_bytes(spoil((cifar / name).read_bytes()))
    with pytest.raises(DataError, match=why) as caught:
        cifar10(path=cifar)
    assert f"The file {cifar / name} is broken" in str(caught.value)


def test_other_forms_of_cifar10_are_passed_over(cifar, nowhere, monkeypatch):
    (cifar / "other" / "cifar10" / "train").mkdir(parents=True)
    monkeypatch.setenv("PELLUCID_DATA", str(cifar / "other"))
    with pytest.raises(DataNotFound, match="cifar10 is not on this machine"):
        cifar10()
    (cifar / "cifar10").mkdir()
    for name in CIFAR:
        (cifar / name).rename(cifar / "cifar10" / name)
    monkeypatch.setenv("PELLUCID_DATA", str(cifar))
    assert len(cifar10().train.dataset) == 15
