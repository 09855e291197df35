"""Workers: the same batches however many there are, and nothing left however they end."""

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict, namedtuple
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset

import pellucid
from pellucid import Learner, Loader
from pellucid.data import ArrayDataset, first
from pellucid.data.files import scan
from pellucid.data.images import ImageFiles
from pellucid.data.making import Job
from pellucid.data.workers import in_threads
from pellucid.errors import DataError, SetupError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")

PACKAGE = Path(pellucid.__file__).parent
LIMIT = 10.0  # seconds within which any error must arrive


def children() -> list[int]:
    """The processes that this one has begun, also those that have ended and were not noticed.

    But for Python's own, which lives as long as this one once anything was spawned.
    """
    found = []
    pythons_own = resource_tracker._resource_tracker._pid
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and int(folder.name) != pythons_own:
                found.append(int(folder.name))
    return found


def fds() -> set[int]:
    return {int(file.name) for file in Path("/proc/self/fd").iterdir()}


def open_files() -> int:
    return len(fds())


def in_use() -> tuple:
    """What a pass with workers might leave behind."""
    others = re.compile(rf"torch_(?!{os.getpid()}_)\d+_")  # the tests beside this one make such
    shm = sorted(file.name for file in Path("/dev/shm").iterdir() if not others.match(file.name))
    return children(), open_files(), threading.active_count(), shm


@pytest.fixture(autouse=True)
def nothing_left():
    before = in_use()
    yield
    assert multiprocessing.active_children() == []
    if in_use() != before:
        gc.collect()  # 0.1 s, for what pytest itself holds of errors
    assert in_use() == before


@contextmanager
def soon():
    """A hang counts as a failure."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < LIMIT


# ── data sets ─────────────────────────────────────────────────────────────────────────────────


class Items:
    """Numbered items; at some of them something happens."""

    def __init__(self, n=40, at=None, seconds=0.0):
        self.n, self.at, self.seconds = n, at or {}, seconds

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)
        if self.seconds:
            time.sleep(self.seconds)
        if i in self.at:
            self.at[i]()
        return torch.full((4,), float(i)), i % 2


class Draws(Dataset):
    """Items that draw from every global generator."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        more = [random.random() for _ in range(i % 3)]  # how many differs from item to item
        return i, random.random(), np.random.rand(2), torch.rand(3), sum(more)


class Point(namedtuple("Point", "x y")):
    pass


def images(folder, n=50, size=None):
    """Write small images of several shapes, JPEG and PNG in turn."""
    folder.mkdir(exist_ok=True)
    source = np.random.default_rng(0)
    for i in source.permutation(n):
        shape = size or (int(source.integers(8, 40)), int(source.integers(8, 40)))
        pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.{'png' if i % 2 else 'jpg'}")
    names = scan(folder)
    return ImageFiles(names, np.arange(n) % 3, size=16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    # the sizes come from a generator in the order of writing, the content from the number
    return images(tmp_path_factory.mktemp("photos"))


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other)) and len(one) == len(other)
    return one == other


def global_state():
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()


# ── the same batches, whatever the number of workers ──────────────────────────────────────────


@pytest.mark.parametrize("kind", ["images", "draws"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_the_same_with_any_number_of_workers(photos, kind, shuffle, drop_last):
    dataset = photos if kind == "images" else Draws(50)
    passes = []
    for workers in range(4):
        before = global_state()
        loader = Loader(dataset, 8, shuffle, drop_last, seed=3, workers=workers)
        passes.append([list(loader) for _ in range(2)])
        assert global_state() == before
    for found in passes[1:]:
        assert same(found, passes[0])
    assert [len(found) for found in passes[0]] == [6 if drop_last else 7] * 2
    assert not same(*passes[0]) or not (shuffle or kind == "draws")


@given(
    n=st.integers(1, 30),
    size=st.integers(1, 9),
    start=st.integers(0, 9),
    workers=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_a_pass_can_be_left_and_taken_up_anywhere(n, size, start, workers, shuffle, drop_last):
    if n < size:
        drop_last = False
    alone = Loader(Draws(n), size, shuffle, drop_last)
    whole = list(alone.batches(2))
    loader = Loader(Draws(n), size, shuffle, drop_last, workers=workers)
    before = global_state()
    begun = list(islice(loader.batches(2), start))
    assert same(begun, whole[:start])
    assert same(list(loader.batches(2, start)), whole[start:])
    assert global_state() == before
    assert loader.epoch == 0


@pytest.mark.parametrize("start", [1, 3, 6, 7, 9])
def test_a_pass_over_images_can_be_taken_up_anywhere(photos, start):
    whole = list(Loader(photos, 8, shuffle=True).batches(1))
    loader = Loader(photos, 8, shuffle=True, workers=2)
    assert same(list(loader.batches(1, start)), whole[start:])
    with pytest.raises(SetupError, match="start=-1"):
        next(loader.batches(1, -1))


def test_what_a_batch_is_made_of_is_told_with_workers_too(photos):
    loader = Loader(photos, 8, shuffle=True, workers=2)
    for _, labels in loader:
        assert torch.equal(photos.labels[loader.drawn.items], labels)
        assert loader.drawn.epoch == 0 and loader.drawn.seed == 0
    assert loader.drawn is None


def test_the_order_in_which_files_were_written_does_not_count(tmp_path):
    contents = {f"{i}.png": np.full((9, 9, 3), i * 20, np.uint8) for i in range(10)}
    found = []
    for order in (list(contents), list(reversed(contents))):
        folder = tmp_path / order[0]
        folder.mkdir()
        for name in order:
            Image.fromarray(contents[name]).save(folder / name)
        found.append(list(Loader(ImageFiles(scan(folder), size=9), 3, shuffle=True, workers=2)))
    assert same(*found)


def test_a_batch_stays_what_it_is_while_the_next_ones_are_made(photos):
    kept = list(Loader(photos, 4, workers=2))  # 13 batches go through 4 places in memory
    assert same(kept, list(Loader(photos, 4)))


class Odd(Items):
    """Items of one kind or another, all of which can be collated."""

    def __init__(self, make):
        super().__init__(7)
        self.make = make

    def __getitem__(self, i):
        return self.make(i)


class Named(dict):
    pass


KINDS = {
    "dict": lambda i: {"x": torch.ones(2) * i, "y": i},
    "dict of dicts": lambda i: Named(x=Named(y=torch.ones(2) * i)),
    "defaultdict": lambda i: defaultdict(list, x=torch.ones(2) * i),
    "named tuple": lambda i: Point(torch.ones(2) * i, i),
    "list": lambda i: [i, float(i)],
    "strings": lambda i: (f"item {i}", b"bytes", i),
    "numpy": lambda i: (np.ones((2, 3)) * i, np.float32(i), np.zeros(())),
    "bfloat16": lambda i: torch.ones(3, dtype=torch.bfloat16) * i,
    "complex": lambda i: torch.ones(3, dtype=torch.complex64).conj() * i,
    "no dimensions": lambda i: torch.tensor(i),
    "empty": lambda i: torch.zeros(0, 3),
    "expanded": lambda i: torch.tensor(float(i)).expand(5),
    "bool": lambda i: (torch.tensor([True, False]), bool(i % 2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_many_kinds_are_collated_as_torch_does(kind):
    dataset = Odd(KINDS[kind])
    expected = list(TorchLoader(dataset, 3))
    for workers in (0, 2):
        found = list(Loader(dataset, 3, workers=workers))
        assert same(found, expected)
        assert type(found[0]) is type(expected[0])


def test_items_that_require_a_gradient_arrive_as_such():
    weight = nn.Parameter(torch.ones(2))
    for batch in Loader(Odd(lambda i: weight * i), 3, workers=2):
        assert batch.requires_grad


@pytest.mark.parametrize("room", [1, 20_000, 60_000, 2**27])
def test_large_batches_travel_whether_there_is_room_for_them_or_not(room, monkeypatch):
    monkeypatch.setattr("pellucid.data.making._ROOM", room)
    dataset = Odd(lambda i: (torch.randn(33, 33), i, torch.randn(999), torch.ones(40, 40).byte()))
    passes = [list(Loader(dataset, 3, workers=workers)) for workers in (0, 2)]
    assert same(*passes)
    for x, *_ in passes[1]:
        x += 1  # it is no one else's
    with pytest.raises(AssertionError):
        assert same(*passes)


def test_what_cannot_be_pickled_works_since_workers_are_forked():
    class Local(Items):
        def __init__(self):
            super().__init__(6)
            self.fn, self.lock = lambda i: i * 2, threading.Lock()

        def __getitem__(self, i):
            with self.lock:
                return self.fn(i)

    assert [x.tolist() for x in Loader(Local(), 3, workers=2)] == [[0, 2, 4], [6, 8, 10]]


def test_a_batch_that_cannot_be_sent_says_so():
    local = namedtuple("local", "x")  # nobody finds it by its name
    with soon(), pytest.raises(DataError, match="Batch 0 cannot be sent from a worker") as caught:
        list(Loader(Odd(lambda i: local(i)), 3, workers=2))
    assert "at the top of a module, or use workers=0" in str(caught.value)


def test_parallel_operations_beforehand_do_not_make_workers_hang(tmp_path):
    folder = images(tmp_path, 6, (300, 300))
    torch.set_num_threads(2)
    try:
        torch.randn(512, 512) @ torch.randn(512, 512)
        (torch.ones(2_000_000) * 2).exp().sum()  # OpenMP's threads are there now
        dataset = ImageFiles(folder.names, folder.labels, size=200)
        loader = Loader(dataset, 2, workers=2)
        loader.timeout = LIMIT
        assert same(list(loader), list(Loader(dataset, 2)))
    finally:
        torch.set_num_threads(1)


# ── workers that end ──────────────────────────────────────────────────────────────────────────

STOPPED = r"Worker (\d) of 2 stopped in epoch \d+\."


@pytest.mark.parametrize("instant", range(40))
def test_a_killed_worker_is_told_at_once_and_leaves_nothing(instant):
    loader = Loader(Items(120, seconds=0.002), 4, workers=2)

    def kill():
        while not (begun := multiprocessing.active_children()):
            time.sleep(0.0005)
        time.sleep(instant * 0.001)
        with suppress(ProcessLookupError, ValueError, IndexError):
            os.kill(begun[instant % len(begun)].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = []
    with soon(), pytest.raises(DataError, match=STOPPED) as caught:
        for batch in loader:
            found.append(batch)
    killer.join()
    text = str(caught.value)
    assert "saw: it was killed by SIGKILL, " in text
    assert "at item " in text or "between two batches" in text
    assert "use fewer workers or smaller batches" in text
    assert children() == []
    assert same(found, list(Loader(Items(120), 4))[: len(found)])


def segfault(by_signal):
    faulthandler.disable()  # pytest's would print where it happened
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if by_signal:
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(LIMIT)
    ctypes.string_at(0)


@pytest.mark.parametrize("by_signal", [True, False])
@pytest.mark.parametrize("item", [0, 7, 21, 38, 39])
def test_a_segmentation_fault_names_the_item(item, by_signal):
    loader = Loader(Items(at={item: partial(segfault, by_signal)}), 4, workers=2)
    loader.epoch = 3
    with soon(), pytest.raises(DataError, match=STOPPED) as caught:
        list(loader)
    assert f"killed by SIGSEGV, at item {item}\n" in str(caught.value)
    assert "in epoch 3" in str(caught.value)
    assert "look at that item with workers=0" in str(caught.value)
    assert children() == []
    loader.dataset.at.clear()
    assert len(list(loader)) == 10


@pytest.mark.parametrize("code", [0, 3, 255])
def test_a_worker_that_leaves_names_the_item(code):
    loader = Loader(Items(at={5: lambda: os._exit(code)}), 4, workers=2)
    with soon(), pytest.raises(DataError, match=STOPPED) as caught:
        list(loader)
    assert f"saw: it ended itself with code {code}, at item 5\n" in str(caught.value)


def test_a_signal_without_a_name_is_told_by_its_number():
    loader = Loader(Items(at={5: lambda: os.kill(os.getpid(), 40)}), 4, workers=2)
    with soon(), pytest.raises(DataError, match="killed by signal 40, at item 5"):
        list(loader)


def test_a_dead_worker_over_images_names_the_file(photos, monkeypatch):
    def read(self, item, out):
        if item == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        out[:] = 0

    monkeypatch.setattr(ImageFiles, "read", read)
    with soon(), pytest.raises(DataError, match=STOPPED) as caught:
        list(Loader(photos, 4, workers=2))
    assert f"at item 9, {photos.names.path(9)}\n" in str(caught.value)


@pytest.mark.parametrize("item", [0, 17, 39])
@pytest.mark.parametrize("how", ["sleeps", "stopped"])
def test_a_worker_that_hangs_is_told(item, how):
    acts = {"sleeps": partial(time.sleep, 60),
            "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP)}  # fmt: skip
    loader = Loader(Items(at={item: acts[how]}), 4, workers=2)
    loader.timeout = 0.7
    with soon(), pytest.raises(DataError, match=r"of 2 has not moved on for 0\.7 s") as caught:
        list(loader)
    text = str(caught.value)
    assert "in epoch 0" in text and f"it is at item {item}\n" in text
    assert "loader.timeout = 600" in text
    assert children() == []


def test_a_slow_loop_and_slow_items_are_no_hang():
    loader = Loader(Items(8, seconds=0.2), 4, workers=1)  # 0.8 s a batch, but it moves on
    loader.timeout = 0.7
    assert len(list(loader)) == 2
    for _ in loader:
        time.sleep(0.8)


# ── errors that travel ────────────────────────────────────────────────────────────────────────


class Plain(Exception):
    pass


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class RaisesOnArrival(Exception):
    def __init__(self, text="over there"):
        super().__init__(text)
        if text == "broken":
            self.args = ("never again",)
        if text == "never again":
            raise RuntimeError("in the constructor")


class NoWords(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raising(error):
    def act():
        raise error

    return act


def failure(error, workers=2, item=13):
    loader = Loader(Items(at={item: raising(error)}), 4, workers=workers)
    loader.epoch = 5
    found = []
    with soon(), pytest.raises(Exception) as caught:
        for batch in loader:
            found.append(batch)
    assert same(found, list(Loader(Items(), 4))[: item // 4])  # whatever came before was given
    assert children() == []
    loader.dataset.at.clear()
    assert len(list(loader)) == 10
    return caught.value


@pytest.mark.parametrize("item", [0, 13, 39])
@pytest.mark.parametrize(
    "error",
    [KeyError("a"), IndexError("far"), OSError(2, "gone", "x.png"), MemoryError(), Plain("p", 1),
     UnicodeDecodeError("utf8", b"x", 0, 1, "bad"), AssertionError(), DataError("a", "b", "c")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_keeps_its_type_and_says_where_it_was(error, item):
    caught = failure(error, item=item)
    assert type(caught) is type(error) and str(caught) == str(error) and caught.args == error.args
    assert caught.__cause__ is None and caught.__context__ is None
    [note] = caught.__notes__
    head, *trace = note.splitlines()
    assert head.startswith(f"raised by item {item} of the data set, epoch 5, in worker ")
    assert head.endswith(" of 2; the traceback there:")
    assert "raise error" in note and "in __getitem__" in note
    assert str(PACKAGE) not in note
    assert len(trace) < 12


@pytest.mark.parametrize("kind", ["needs two", "unpicklable", "raises", "local", "no words"])
def test_an_error_that_cannot_travel_is_told_in_words(kind):
    class Local(Exception):
        pass

    error, text = {
        "needs two": (NeedsTwo("one", "two"), "NeedsTwo: one and two"),
        "unpicklable": (Unpicklable("locked"), "Unpicklable: locked"),
        "raises": (RaisesOnArrival("broken"), "RaisesOnArrival: never again"),
        "local": (Local("here"), "Local: here"),
        "no words": (NoWords(), "NoWords"),
    }[kind]
    caught = failure(error)
    if kind == "no words":  # a type that travels, though it cannot speak
        assert type(caught) is NoWords
    else:
        assert type(caught) is DataError and text in str(caught)
        assert "with workers=0 it comes as it is" in str(caught)
    assert "raised by item 13 of the data set, epoch 5, in worker" in caught.__notes__[-1]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_an_item_that_wants_to_end_the_process_is_an_error(error, capfd):
    caught = failure(error)
    assert type(caught) is DataError and type(error).__name__ in str(caught)
    assert "in worker" in caught.__notes__[-1]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_own_notes_and_causes_are_kept(workers):
    def act():
        try:
            [][1]
        except IndexError:
            error = Plain("after that")
            error.add_note("my note")
            raise error from None

    loader = Loader(Items(at={2: act}), 4, workers=workers)
    with soon(), pytest.raises(Plain) as caught:
        list(loader)
    assert caught.value.__notes__[0] == "my note"
    assert len(caught.value.__notes__) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_stops_an_iteration_does_not_end_the_pass_in_silence(workers):
    loader = Loader(Items(at={13: lambda: next(iter(()))}), 4, workers=workers)
    with soon(), pytest.raises(DataError, match="Item 13 of the data set came to the end") as found:
        list(loader)
    assert "StopIteration in epoch 0" in str(found.value)


LIMITED = ["bytes", "numpy", "torch", "list"]


@pytest.mark.parametrize("what", LIMITED)
def test_no_memory_left_is_told_with_the_item(what):
    def act():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**25, resource.RLIM_INFINITY))
        hog = {"bytes": lambda: bytearray(2**30), "numpy": lambda: np.ones(2**27),
               "torch": lambda: torch.ones(2**28), "list": lambda: [0] * 2**27}  # fmt: skip
        hog[what]()

    with soon(), pytest.raises((MemoryError, RuntimeError, DataError)) as caught:
        list(Loader(Items(at={6: act}), 4, workers=2))
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "item 6" in text and "epoch 0" in text and "orker" in text
    assert children() == []


def test_a_broken_image_names_file_worker_and_epoch(tmp_path):
    files = images(tmp_path, 12)
    Path(files.names.path(7)).write_bytes(b"no image")
    loader = Loader(files, 2, workers=2)
    with soon(), pytest.raises(DataError, match="cannot be read as an image") as caught:
        list(loader)
    assert files.names.path(7) in str(caught.value)
    [note] = caught.value.__notes__
    assert note.startswith("item 7 of the data set, epoch 0, in worker ")
    assert our_frames(caught.value) == []
    with pytest.raises(DataError) as alone:
        list(Loader(files, 2))
    assert str(alone.value) == str(caught.value) and our_frames(alone.value) == []


def our_frames(error):
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.name for frame in frames if PACKAGE in Path(frame.filename).parents]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [lambda i: torch.zeros(2 + i % 2), lambda i: None,
                                  lambda i: object(), lambda i: "a" if i else 3])  # fmt: skip
def test_items_that_do_not_go_together_are_named(make, workers):
    with soon(), pytest.raises((RuntimeError, TypeError)) as caught:
        list(Loader(Odd(make), 4, workers=workers))
    note = caught.value.__notes__[-1]
    assert "in making one batch of 4 items of the data set, epoch 0: item " in note
    assert "in worker" in note or not workers


def test_ragged_items_are_described():
    with pytest.raises(RuntimeError) as caught:
        list(Loader(Odd(lambda i: torch.zeros(2 + i % 2)), 3))
    assert caught.value.__notes__ == [
        "raised in making one batch of 3 items of the data set, epoch 0: "
        "item 0 is float32 2, item 1 is float32 3"
    ]


def test_what_items_print_is_seen(capfd):
    loader = Loader(Items(8, at={3: partial(print, "item three")}), 4, workers=2)
    list(loader)
    assert capfd.readouterr().out.count("item three") == 1


# ── a learner ─────────────────────────────────────────────────────────────────────────────────


def learner(loader, quiet):
    return Learner(
        nn.Linear(4, 2), (loader, None), F.cross_entropy, callbacks=[quiet], device="cpu"
    )


def assert_clean(learn):
    assert children() == []
    assert all(param.grad is None for param in learn.model.parameters())
    for module in learn.model.modules():
        assert not module.training
        assert not any(value for key, value in vars(module).items() if "hooks" in key)


@pytest.mark.parametrize(
    ("act", "kind"),
    [(raising(KeyError("k")), KeyError), (partial(os._exit, 3), DataError),
     (lambda: os.kill(os.getpid(), signal.SIGKILL), DataError),
     (raising(NeedsTwo(1, 2)), DataError)],
)  # fmt: skip
def test_a_learner_can_go_on_after_a_worker_failed(act, kind, quiet):
    loader = Loader(Items(at={25: act}), 4, workers=2)
    learn = learner(loader, quiet)
    with soon(), pytest.raises(kind) as caught:
        learn.fit(2)
    assert len(our_frames(caught.value)) <= 3, our_frames(caught.value)
    assert_clean(learn)
    loader.dataset.at.clear()
    learn.fit(1)
    assert_clean(learn)


def test_an_error_elsewhere_in_a_fit_ends_the_workers_before_it_is_handled(quiet):
    loader = Loader(Items(), 4, workers=2)
    learn = learner(loader, quiet)
    learn.loss_func = lambda preds, y: [][1]
    with pytest.raises(IndexError) as caught:
        learn.fit(1)
    assert caught.value.__traceback__ is not None  # with all its frames
    assert children() == []


# ── what is asked for ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [-1, 1.0, True, "2", None])
def test_workers_that_cannot_be_counted_are_refused(workers):
    with pytest.raises(SetupError, match="Workers are counted"):
        Loader(Items(), 4, workers=workers)
    assert len(list(Loader(Items(), np.int64(4), workers=np.int64(1)))) == 10


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_a_batch_size_that_is_no_number_of_items_is_refused(size):
    with pytest.raises(SetupError, match="one item or more"):
        Loader(Items(), size)


def test_workers_for_data_in_memory_are_refused():
    with pytest.raises(SetupError, match="leave workers out"):
        Loader(ArrayDataset(torch.zeros(4)), 2, workers=2)


def test_what_has_no_numbered_items_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(4))

    for dataset in (iter([1]), (i for i in range(3)), {1, 2}, Stream(), 3):
        with pytest.raises(SetupError, match=r"needs a data set with len\(\) and items by number"):
            Loader(dataset, 2)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_few_items(workers):
    with pytest.raises(DataError, match="no batch"):
        Loader(Items(0), 4, workers=workers)
    with pytest.raises(DataError, match="no batch"):
        Loader(Items(3), 4, drop_last=True, workers=workers)
    assert [len(x) for x, _ in Loader(Items(3), 4, workers=workers)] == [3]
    assert [len(x) for x, _ in Loader(Items(5), 4, workers=workers)] == [4, 1]
    assert len(list(Loader(Items(5), 4, drop_last=True, workers=workers))) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_length_that_is_too_long_gives_the_data_sets_own_error(workers):
    class Lying(Items):
        def __len__(self):
            return 12

    with soon(), pytest.raises(IndexError) as caught:
        list(Loader(Lying(9), 4, workers=workers))
    assert "raised by item 9 of the data set, epoch 0" in caught.value.__notes__[0]
    short = Loader([1, 2, 3], 2, workers=workers)
    assert [x.tolist() for x in short] == [[1, 2], [3]]


def test_other_systems_are_told(monkeypatch, photos):
    loader, over_images = Loader(Items(), 4, workers=2), Loader(photos, 4, workers=2)
    monkeypatch.setattr("pellucid.data.workers.sys.platform", "darwin")
    with pytest.raises(SetupError, match="safe fork, which Linux alone has"):
        next(iter(loader))
    assert same(list(over_images), list(Loader(photos, 4)))
    assert loader.dataset is not None and len(list(Loader(Items(), 4))) == 10


# ── whatever way a pass goes, nothing is left ─────────────────────────────────────────────────


def test_first_needs_no_process_and_changes_nothing(photos):
    for dataset in (photos, Draws(20)):
        loader = Loader(dataset, 4, shuffle=True, workers=2)
        before = vars(loader).copy()
        looked = first(loader)
        assert vars(loader) == before
        assert same(looked, next(iter(loader)))


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("way", ["break", "del", "gc", "close", "error"])
def test_a_pass_that_is_left_ends_its_workers(way, n):
    batches = iter(Loader(Items(seconds=0.001), 2, workers=2))
    for _ in range(n):
        next(batches)
    if way == "break":
        for _ in batches:
            break
        assert children()  # the name still holds it
        batches.close()
    elif way == "gc":
        cycle = [batches]
        cycle.append(cycle)
        del cycle
    elif way == "close":
        batches.close()
    elif way == "error":
        with pytest.raises(ZeroDivisionError):
            for _ in batches:
                1 / 0  # noqa: B018
    del batches
    gc.collect()
    assert children() == []


def test_two_loaders_at_once(photos):
    train, valid = Loader(Draws(30), 4, workers=2), Loader(photos, 8, workers=2)
    for _ in range(2):
        epoch = train.epoch
        expected = [list(Loader(Draws(30), 4).batches(epoch)), list(Loader(photos, 8))]
        pairs = list(zip(train, valid, strict=False))
        assert same([a for a, _ in pairs], expected[0][: len(pairs)])
        assert same([b for _, b in pairs], expected[1][: len(pairs)])
    assert children() == []


def test_two_passes_of_one_loader_at_once():
    loader = Loader(Draws(20), 4, workers=2)
    one, two = zip(*zip(loader, loader, strict=True), strict=True)
    alone = Loader(Draws(20), 4)
    assert same(list(one), list(alone)) and same(list(two), list(alone))


def test_a_loader_within_a_worker_makes_its_batches_there():
    inner = Loader(Draws(6), 2, workers=2)

    class Nested(Items):
        def __getitem__(self, i):
            batches = list(inner.batches(i))
            return torch.cat([batch[3] for batch in batches])

    alone = list(Loader(Nested(4), 2))
    assert same(list(Loader(Nested(4), 2, workers=2)), alone)
    assert torch.equal(torch.cat(list(TorchLoader(Nested(4), 2))), torch.cat(alone))


def test_a_pass_in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(Loader(Draws(20), 4, workers=2)))
    thread.start()
    thread.join(LIMIT)
    assert same(found, list(Loader(Draws(20), 4)))


@contextmanager
def room_for_files(n):
    """Let exactly `n` more files be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(fds())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 30, hard))
    opened = []
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(n):
            os.close(opened.pop())
        yield
    finally:
        for file in opened:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("n", range(0, 10, 2))
def test_no_room_for_files_is_told_and_loses_none(n):
    loader = Loader(Items(), 4, workers=2)
    before = open_files()
    with room_for_files(n), soon(), pytest.raises(SetupError, match="Too many open files") as found:
        list(loader)
    assert "does not let worker 0 of 2 start" in str(found.value)
    assert "`ulimit -n`" in str(found.value)
    assert open_files() == before
    with room_for_files(12):
        assert len(list(loader)) == 10


def test_a_fork_that_fails_is_told(monkeypatch):
    real, left = os.fork, [1]

    def fork():
        if not left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left.pop()
        return real()

    loader = Loader(Items(), 4, workers=2)
    before = fds()
    with monkeypatch.context() as patch, pytest.raises(SetupError, match="ulimit -u") as caught:
        patch.setattr(os, "fork", fork)
        list(loader)
    assert "worker 1 of 2" in str(caught.value) and children() == []
    assert len(list(loader)) == 10
    for file in fds() - before:  # multiprocessing's own, left open
        with suppress(OSError):
            os.close(file)


def test_no_room_in_memory_is_told(monkeypatch):
    def refuse(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("pellucid.data.workers.mmap.mmap", refuse)
    with pytest.raises(SetupError, match="Cannot allocate memory") as caught:
        list(Loader(Items(), 4, workers=2))
    assert "`ulimit -v`" in str(caught.value)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_and_files_do_not_grow_over_epochs(tmp_path):
    loader = Loader(images(tmp_path, 2000, (8, 8)), 64, shuffle=True, workers=2)
    sizes = []
    for _ in range(4):
        assert sum(len(x) for x, _ in loader) == 2000
        gc.collect()
        sizes.append((resident(), open_files()))
    assert sizes[-1][0] - sizes[1][0] < 4 * 2**20
    assert sizes[-1][1] == sizes[0][1]


def test_fifty_passes_leave_nothing():
    loader = Loader(Items(6), 2, workers=2)
    sizes = []
    for _ in range(50):
        list(loader)
        sizes.append((resident(), open_files()))
    assert sizes[-1][0] - sizes[9][0] < 4 * 2**20
    assert sizes[-1][1] == sizes[0][1]


# ── threads ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_workers", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7, 50, 60])
def test_threads_give_the_same_batches(photos, size, n_workers):
    parts = torch.arange(50).split(size)
    assert same(list(in_threads(Job(photos, 0, 0), parts, n_workers)), list(Loader(photos, size)))


def test_threads_tell_errors_and_are_gone_after_a_break(photos, monkeypatch):
    before = threading.active_count()
    for _ in in_threads(Job(photos, 0, 0), torch.arange(50).split(4), 2):
        break
    assert threading.active_count() == before
    real = ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda *args: "broken" if args[1] == 9 else real(*args))
    found = []
    with pytest.raises(DataError, match=r"0009\.png cannot be read") as caught:
        for batch in in_threads(Job(photos, 0, 4), torch.arange(50).split(4), 2):
            found.append(batch)
    assert len(found) == 2 and caught.value.__notes__ == ["item 9 of the data set, epoch 4"]
    assert threading.active_count() == before


# ── interrupts ────────────────────────────────────────────────────────────────────────────────

SCRIPT = r"""
import multiprocessing, os, random, signal, sys, tempfile, time, traceback
import torch
from pathlib import Path
from pellucid import Loader

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)

class Items:
    def __len__(self):
        return 12
    def __getitem__(self, i):
        time.sleep(0.001)
        return i

def alive(group):
    found = []
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(folder.name)
        except (OSError, ValueError):
            pass
    return found

def passes(ready):  # in a process of its own that leads a group
    loader = Loader(Items(), 2, workers=2)
    list(loader)
    os.write(ready, b"x")
    while True:
        for _ in loader:
            pass

def wait(pid, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.002)
    return None

def round_of(numbers, to_group, instant, gap, leave):
    read, write = os.pipe()
    errors = tempfile.TemporaryFile("w+")
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        os.dup2(errors.fileno(), 2)
        try:
            passes(write)
        except KeyboardInterrupt:
            if leave:  # the way out of an interpreter takes half a second
                traceback.print_exc()
                os._exit(77 if multiprocessing.active_children() else 130)
            raise
    os.read(read, 1)
    time.sleep(instant)
    for number in numbers:
        (os.killpg if to_group else os.kill)(pid, number)
        time.sleep(gap)
    code = wait(pid, 10)
    end = time.monotonic() + 10
    while (left := alive(pid)) and time.monotonic() < end:
        time.sleep(0.01)
    if left or code is None:
        os.killpg(pid, signal.SIGKILL)
    os.close(read); os.close(write)
    with errors:
        errors.seek(0)
        return code, left, errors.read()

for scenario in sys.argv[1:]:
    names, rounds, to = scenario.split(":")
    numbers = [getattr(signal, name) for name in names.split(",")]
    draw = random.Random(scenario)
    for i in range(int(rounds)):
        instant, gap = draw.uniform(0, 0.08), draw.uniform(0, 0.004)
        found = round_of(numbers, to == "group", instant, gap, leave=i % 5 > 0)
        print(repr((scenario, found)), flush=True)
"""

SCENARIOS = ["SIGINT:40:group", "SIGINT,SIGINT:10:group", "SIGTERM:20:main", "SIGKILL:5:main"]


@pytest.fixture(scope="module")
def interrupted():
    """What came of each process that was interrupted: exit code and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *SCENARIOS], capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "" and done.returncode == 0
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        scenario, (code, left, text) = eval(line)
        assert code is not None, "it did not end"
        assert left == [] and "ForkProcess" not in text, text
        found[scenario].append((code, text))
    assert [len(found[scenario]) for scenario in SCENARIOS] == [40, 10, 20, 5]
    return [found[scenario] for scenario in SCENARIOS]


def test_ctrl_c_at_any_instant_ends_everything_without_noise(interrupted):
    for code, text in interrupted[0]:
        assert code in (-signal.SIGINT, 130)
        assert text.count("Traceback") == 1 and text.endswith("KeyboardInterrupt\n"), text
        assert "Exception ignored" not in text, text


def test_ctrl_c_twice_ends_everything(interrupted):
    for code, text in interrupted[1]:
        assert code in (-signal.SIGINT, 1, 130) and "KeyboardInterrupt" in text


def test_a_terminated_process_takes_its_workers_along(interrupted):
    assert interrupted[2] == [(-signal.SIGTERM, "")] * 20


def test_a_killed_process_takes_its_workers_along(interrupted):
    assert interrupted[3] == [(-signal.SIGKILL, "")] * 5
