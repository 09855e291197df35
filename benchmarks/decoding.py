r"""How fast do JPEG files become batches?

Shuffled batches of 64 from files that the system holds in memory, decoded anew in every epoch,
two workers, one torch thread each, in turns. `small` are 20,000 files of CIFAR-10, found through
$PELLUCID_DATA; `big` are 2,000 mosaics of them, as large as common photographs.

    python benchmarks/decoding.py                         # all, in about six minutes
    python benchmarks/decoding.py small cached            # these parts alone
    python benchmarks/decoding.py --folder jpegs          # keeps the files for the next run

Peers are optional; to have them, make them an environment of their own:

    python -m venv peers && peers/bin/pip install -c constraints.txt -e . \
        -r benchmarks/requirements-peers.txt
    peers/bin/pip install --no-deps fastai==2.8.12 torchvision==0.28.0
    peers/bin/python benchmarks/decoding.py
"""

import argparse
import ctypes
import multiprocessing
import os
import resource
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from measure import in_turns, report, spread, table
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from pellucid import DataLoaders
from pellucid.data import ArrayDataset, FileNames, ImageFiles, Loader, decode_image, scan
from pellucid.data.making import Job
from pellucid.data.workers import in_threads

BATCH, BIG_SIDE, SMALL_SIDE = 64, 160, 32
N_BIG, N_CLASSES, PER_CLASS = 2000, 10, 2000
REPEATS = {"big": 5, "small": 7, "cached": 15, "start-up": 9, "limits": 5}
OURS, PILLOW = "pellucid, 2 workers", "torch DataLoader + Pillow, 2 workers"
TORCHVISION = "torch DataLoader + torchvision, 2 workers"
STAND_IN = "torch DataLoader + simplejpeg + torch's scaling, 2 workers"

Item = tuple[Tensor, int]
Decoder = Callable[[str, int], Tensor]


# ── the files ───────────────────────────────────────────────────────────────────────────────────


def small_files(folder: Path) -> FileNames:
    """Return 2,000 training images of each of CIFAR-10's classes, 32×32."""
    if not (folder / "small").exists():
        part = folder / "small.part"
        with tarfile.open(Path(os.environ["PELLUCID_DATA"]) / "cifar10-jpeg.tar.xz") as archive:
            for member in archive:
                kind, name = Path(member.name).parts[1:2], Path(member.name)
                if member.isfile() and kind == ("train",) and int(name.stem) < PER_CLASS:
                    place = part / name.parent.name / name.name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(archive.extractfile(member).read())
        part.rename(folder / "small")
    return scan(folder / "small")


def big_files(folder: Path) -> FileNames:
    """Return mosaics of small images, 500×375 in quality 90 and 4:2:0.

    One small image scaled up would be smooth and decode faster than a photograph does.
    """
    if not (folder / "big").exists():
        part, small = folder / "big.part", small_files(folder)
        paths = [small.path(item) for item in range(len(small))]
        tiles = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        rng = np.random.default_rng(0)
        for number in range(N_BIG):
            chosen = tiles[rng.integers(len(tiles), size=(12, 16))]
            mosaic = chosen.swapaxes(1, 2).reshape(12 * 32, 16 * 32, 3)[:375, :500]
            place = part / f"class {number % N_CLASSES}" / f"{number:04d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mosaic).save(place, quality=90, subsampling="4:2:0")
        part.rename(folder / "big")
    return scan(folder / "big")


def image_files(names: FileNames, side: int) -> ImageFiles:
    """Return the files as pellucid's data set; the classes are the folders."""
    folders = [name.partition("/")[0] for name in names]
    return ImageFiles(names, np.unique(folders, return_inverse=True)[1], side)


def contents(names: FileNames) -> list[bytes]:
    return [Path(names.path(item)).read_bytes() for item in range(len(names))]


def kilobytes(names: FileNames) -> float:
    """Return the mean size of the files."""
    return statistics.mean(map(len, contents(names))) / 1e3


# ── how torch's users decode ────────────────────────────────────────────────────────────────────


def with_pillow(path: str, side: int, draft: bool = False) -> Tensor:
    """Scale the shorter side, cut out the middle; `draft` decodes at a half size where it may."""
    image = Image.open(path)
    if draft:
        image.draft("RGB", (side, side))
    image = image.convert("RGB")
    if min(image.size) != side:
        factor = side / min(image.size)
        width, height = (round(length * factor) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def with_simplejpeg(path: str, side: int) -> Tensor:
    image = simplejpeg.decode_jpeg(Path(path).read_bytes(), "RGB")
    return scaled(torch.from_numpy(image).permute(2, 0, 1), side)


def with_torchvision(path: str, side: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    return scaled(decode_jpeg(read_file(path), ImageReadMode.RGB), side)


def scaled(image: Tensor, side: int) -> Tensor:
    """Scale the shorter side of an image (3, h, w), antialiased, and cut out the middle."""
    if min(image.shape[1:]) == side:
        return image
    factor = side / min(image.shape[1:])
    height, width = (round(length * factor) for length in image.shape[1:])
    top, left = (height - side) // 2, (width - side) // 2
    image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    return image[:, top : top + side, left : left + side]


class Items(Dataset[Item]):
    """Files as a map-style data set; item i is (uint8 (3, h, w), label)."""

    def __init__(self, files: ImageFiles, decode: Decoder):
        self.paths = [files.names.path(item) for item in range(len(files))]
        self.labels, self.side, self.decode = files.labels.tolist(), files.shape[0], decode

    def __getitem__(self, item: int) -> Item:
        return self.decode(self.paths[item], self.side), self.labels[item]

    def __len__(self) -> int:
        return len(self.paths)


class Batches(Items):
    """The same, where an item is a whole batch: the fastest that torch's DataLoader can be fed."""

    def __getitem__(self, items: list[int]) -> tuple[Tensor, Tensor]:
        images = np.empty((len(items), self.side, self.side, 3), np.uint8)
        for item, image in zip(items, images, strict=True):
            simplejpeg.decode_jpeg(Path(self.paths[item]).read_bytes(), "RGB", buffer=image)
        labels = torch.tensor([self.labels[item] for item in items])
        return torch.from_numpy(images).permute(0, 3, 1, 2), labels


def of_torch(files: ImageFiles, decode: Decoder, workers: int) -> DataLoader[Any]:
    return DataLoader(Items(files, decode), BATCH, shuffle=True, num_workers=workers)


def of_torch_whole_batches(files: ImageFiles) -> DataLoader[Any]:
    dataset = Batches(files, with_simplejpeg)
    sampler = BatchSampler(RandomSampler(dataset), BATCH, drop_last=False)
    return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=2)


def of_fastai(files: ImageFiles) -> Iterable[Any]:
    from fastai.vision.all import ImageDataLoaders, Resize

    resize = Resize(files.shape[0])  # valid_pct must leave one image to validation
    options = {"item_tfms": resize, "bs": BATCH, "num_workers": 2, "device": "cpu"}
    return ImageDataLoaders.from_folder(files.names.root, valid_pct=0.001, **options).train


@cache
def missing(peer: str) -> str:
    """Import "torchvision" or "fastai"; return why it cannot be, or ""."""
    try:
        if needs_stand_ins():
            stand_in_for_cuda()
        if peer == "torchvision":
            from torchvision.io import decode_jpeg

            small = bytearray(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
            decode_jpeg(torch.frombuffer(small, dtype=torch.uint8))
        else:
            import fastai.vision.all  # noqa: F401, only to see whether it can be imported
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"{peer} left out: {str(error).splitlines()[0]}."
    finally:
        torch.set_num_threads(1)
    return ""


def needs_stand_ins() -> bool:
    """Say whether torchvision's libraries want a CUDA that torch here does not have."""
    found = find_spec("torchvision")
    if found is None or found.origin is None or torch.version.cuda:
        return False
    return b"libtorch_cuda.so" in Path(found.origin).with_name("image.so").read_bytes()


@cache
def stand_in_for_cuda() -> None:
    """Load empty libraries in place of torch's CUDA, so that PyPI's torchvision can be imported.

    Its JPEG decoder for the CPU calls nothing of them, they must only be there.
    """
    image = Path(find_spec("torchvision").origin).with_name("image.so")
    lines = subprocess.check_output(["nm", "-D", "-u", image], text=True).splitlines()
    wanted = [line.split()[-1] for line in lines if "cuda" in line and "@" not in line]
    source = "\n".join(f'char s{i}[64] __asm__("{name}");' for i, name in enumerate(wanted))
    with TemporaryDirectory() as folder:
        for library, content in (("libtorch_cuda.so", source), ("libc10_cuda.so", "")):
            path = Path(folder) / library
            command = ["cc", "-shared", f"-Wl,-soname,{library}", "-o", path, "-x", "c", "-"]
            subprocess.run(command, input=content, text=True, check=True)
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    forward = ["roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"]
    backward = [f"_{name}_backward" for name in forward]
    for name in ["nms", "qnms", "qroi_align", *forward, *backward]:
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


# ── measuring ───────────────────────────────────────────────────────────────────────────────────


class Cost(NamedTuple):
    """What a pass took: images, seconds by the clock, seconds of CPU with all its processes."""

    images: int
    wall: float
    cpu: float

    @property
    def speed(self) -> float:
        """Images a second."""
        return self.images / self.wall

    @property
    def thrift(self) -> float:
        """Images a second of CPU."""
        return self.images / self.cpu


def cost(run: Callable[[], int]) -> Cost:
    cpu, began = _cpu(), time.perf_counter()
    images = run()
    return Cost(images, time.perf_counter() - began, _cpu() - cpu)


def _cpu() -> float:
    """Return the CPU seconds of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def drain(batches: Iterable[Any]) -> int:
    """Take every batch, and return how many images there were."""
    return sum(len(labels) for _, labels in batches)


def speeds(
    loaders: Mapping[str, Iterable[Any]], repeats: int, against: Mapping[str, str], digits: int = 2
) -> str:
    """Measure one pass of each loader in turns; return their speeds, also against some of them."""
    runs = {name: partial(drain, loader) for name, loader in loaders.items()}
    costs: dict[str, list[Cost]] = in_turns(runs, repeats, cost)
    heads = ["loader", "images/s", "images/CPU s"]
    heads += [f"× {short}{cpu}" for short in against for cpu in ("", ", CPU")]
    rows = []
    for name, passes in costs.items():
        row = [spread([one.speed for one in passes], 0), spread([one.thrift for one in passes], 0)]
        for other in against.values():
            pairs = list(zip(passes, costs[other], strict=True))
            row.append(spread([one.speed / base.speed for one, base in pairs], digits))
            row.append(spread([one.thrift / base.thrift for one, base in pairs], digits))
        rows.append([name, *row])
    return table(heads, rows)


# ── the parts ───────────────────────────────────────────────────────────────────────────────────


class Threads:
    """Pellucid's batches made in two threads, as where no process can be forked."""

    def __init__(self, files: ImageFiles):
        self.loader = Loader(files, BATCH, shuffle=True)

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        loader.epoch += 1
        parts = loader.order(loader.epoch).split(BATCH)
        return in_threads(Job(loader.dataset, loader.seed, loader.epoch), parts, 2)


def big(folder: Path) -> list[str]:
    """Decode photographs to 160×160."""
    files = image_files(big_files(folder), BIG_SIDE)
    absent = {peer: missing(peer) for peer in ("torchvision", "fastai")}
    loaders: dict[str, Iterable[Any]] = {
        OURS: Loader(files, BATCH, shuffle=True, workers=2),
        "pellucid, 2 threads": Threads(files),
        PILLOW: of_torch(files, with_pillow, 2),
        "torch DataLoader + Pillow's draft, 2 workers": of_torch(
            files, partial(with_pillow, draft=True), 2
        ),
        STAND_IN: of_torch(files, with_simplejpeg, 2),
    }
    against = {"Pillow": PILLOW, "simplejpeg in full, for torchvision": STAND_IN}
    if not absent["torchvision"]:
        loaders[TORCHVISION] = of_torch(files, with_torchvision, 2)
        against = {"Pillow": PILLOW, "torchvision": TORCHVISION}
    if not absent["fastai"]:
        loaders["fastai ImageDataLoaders, 2 workers"] = of_fastai(files)
    what = f"{len(files):,} files of 500×375, {kilobytes(files.names):.0f} kB each, to 160×160."
    notes = [reason for reason in absent.values() if reason]
    return [what, speeds(loaders, REPEATS["big"], against), *notes]


def small(folder: Path) -> list[str]:
    """Decode CIFAR-10, where what surrounds decoding counts."""
    files = image_files(small_files(folder), SMALL_SIDE)
    loaders: dict[str, Iterable[Any]] = {
        f"pellucid, {n} worker{'s' * (n != 1)}": Loader(files, BATCH, shuffle=True, workers=n)
        for n in (2, 1, 0)
    }
    loaders |= {
        "pellucid, 2 threads": Threads(files),
        PILLOW: of_torch(files, with_pillow, 2),
        "torch DataLoader + Pillow, 0 workers": of_torch(files, with_pillow, 0),
        "torch DataLoader + simplejpeg, 2 workers": of_torch(files, with_simplejpeg, 2),
        "torch DataLoader + simplejpeg, items are batches, 2 workers": of_torch_whole_batches(
            files
        ),
    }
    absent = missing("torchvision")
    if not absent:
        loaders[TORCHVISION] = of_torch(files, with_torchvision, 2)
    what = f"{len(files):,} files of 32×32, {kilobytes(files.names):.1f} kB each, as they are."
    against = {"Pillow, 2 workers": PILLOW}
    return [what, speeds(loaders, REPEATS["small"], against), *([absent] * bool(absent))]


def cached(folder: Path) -> list[str]:
    """Gather images that were decoded before, against the same images in an array."""
    names = small_files(folder)
    os.environ["PELLUCID_HOME"] = str(folder / "home")

    def split(names: FileNames) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(BATCH, len(names)), np.arange(BATCH)

    memory, disk = (
        DataLoaders.from_folder(names.root, SMALL_SIDE, BATCH, split, cache=cache).train
        for cache in ("memory", "disk")
    )
    n = len(memory.dataset)
    images, labels = next(memory.dataset.batches(torch.arange(n), n))
    arrays = images.contiguous(), labels
    gather = "Loader over ArrayDataset (n, 3, h, w)"
    loaders = {
        'from_folder(cache="memory")': memory,
        'from_folder(cache="disk")': disk,
        gather: Loader(ArrayDataset(*arrays), BATCH, shuffle=True),
        "index_select alone": SelectAlone(arrays, torch.randperm(n)),
    }
    what = f"{n:,} images of 32×32 from the second epoch on, no workers; batches of {BATCH}."
    return [what, speeds(loaders, REPEATS["cached"], {"the array": gather}, 3)]


class SelectAlone:
    """The limit: the order is known, and nobody asks for the batches one by one."""

    def __init__(self, arrays: tuple[Tensor, Tensor], order: Tensor):
        self.arrays, self.order = arrays, order

    def __iter__(self) -> Iterator[Any]:
        for items in self.order.split(BATCH):
            yield tuple(array.index_select(0, items) for array in self.arrays)


def start_up(folder: Path) -> list[str]:
    """Time the first batch of an epoch, from `iter()` on."""
    rows = []
    for names, side in ((small_files(folder), SMALL_SIDE), (big_files(folder), BIG_SIDE)):
        files = image_files(names, side)
        loaders = {
            OURS: Loader(files, BATCH, shuffle=True, workers=2),
            PILLOW: of_torch(files, with_pillow, 2),
            STAND_IN: of_torch(files, with_simplejpeg, 2),
        }
        runs = {name: partial(iter, loader) for name, loader in loaders.items()}
        times = in_turns(runs, REPEATS["start-up"], until_first)
        for name, seconds in times.items():
            ratios = [ours / one for ours, one in zip(times[OURS], seconds, strict=True)]
            milliseconds = spread([one * 1e3 for one in seconds])
            rows.append([f"{side}×{side}", name, milliseconds, spread(ratios, 2)])
    return [table(["images", "loader", "first batch after, ms", "pellucid's time to its"], rows)]


def until_first(begin: Callable[[], Iterator[Any]]) -> float:
    """Return the seconds until the first batch; ending the workers is not counted."""
    began = time.perf_counter()
    batches = begin()
    next(batches)
    return time.perf_counter() - began


def limits(folder: Path) -> list[str]:
    """Decode alone, from memory, in two processes: no file, no scaling, no batch."""
    held = {"big": contents(big_files(folder)), "small": contents(small_files(folder)) * 5}
    runs = {
        ("big", "500×375"): partial(decoding_alone, held["big"], 0),
        ("big", "250×188"): partial(decoding_alone, held["big"], BIG_SIDE),
        ("small", "32×32"): partial(decoding_alone, held["small"], 0),
    }
    rates = in_turns(runs, REPEATS["limits"], lambda run: run())
    rows = [[*what, spread(found, 0)] for what, found in rates.items()]
    return [table(["files", "decoded to", "images/s"], rows)]


def decoding_alone(contents: list[bytes], least: int) -> float:
    """Return how many images a second two processes decode together, from the first to the last."""
    fork = multiprocessing.get_context("fork")
    pipe, theirs = fork.Pipe(duplex=False)
    start = fork.Barrier(2)

    def decode(part: list[bytes]) -> None:
        start.wait()
        began = time.perf_counter()
        for content in part:
            simplejpeg.decode_jpeg(content, "RGB", False, False, least, least)
        theirs.send(len(part) / (time.perf_counter() - began))

    processes = [fork.Process(target=decode, args=(contents[half::2],)) for half in (0, 1)]
    for process in processes:
        process.start()
    rates = [pipe.recv() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def quality(folder: Path) -> list[str]:
    """Compare pixels with an image decoded in full and scaled by Pillow with antialiasing."""
    names = big_files(folder)
    paths = [names.path(item) for item in range(0, len(names), len(names) // 200)]
    ways = {
        "pellucid": with_pellucid,
        "simplejpeg in full, torch's scaling": with_simplejpeg_in_full,
        "Pillow's draft, bilinear": partial(fitted, draft=True),
        "Pillow in full, bilinear": fitted,
    }
    filters = {"bilinear": Image.Resampling.BILINEAR, "Lanczos": Image.Resampling.LANCZOS}
    rows = []
    for name, decode in ways.items():
        row = [name]
        for kind in filters.values():
            pairs = [(decode(path).astype(float), fitted(path, kind)) for path in paths]
            row += ["0", "∞"] if (decode, kind) == (fitted, filters["bilinear"]) else apart(pairs)
        rows.append(row)
    heads = ["160×160 by"]
    heads += [f"{what} {kind}" for kind in filters for what in ("mean difference to", "PSNR to")]
    return ["200 of the big files; differences in grey levels, PSNR in dB.", table(heads, rows)]


def apart(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Return how far apart the images of each pair are: mean difference and PSNR."""
    differences = [one - other for one, other in pairs]
    ratios = [10 * np.log10(255**2 / (one**2).mean()) for one in differences]
    mean = statistics.mean(float(np.abs(one).mean()) for one in differences)
    return [f"{mean:.2f}", f"{statistics.mean(map(float, ratios)):.1f}"]


def with_pellucid(path: str) -> np.ndarray:
    image = np.empty((BIG_SIDE, BIG_SIDE, 3), np.uint8)
    decode_image(Path(path).read_bytes(), image)
    return image


def with_simplejpeg_in_full(path: str) -> np.ndarray:
    """Cut out the middle square and scale it by torch, as pellucid does, without a half size."""
    whole = simplejpeg.decode_jpeg(Path(path).read_bytes(), "RGB")
    left = (whole.shape[1] - whole.shape[0]) // 2
    square = torch.from_numpy(whole[:, left : left + whole.shape[0]])
    return scaled(square.permute(2, 0, 1), BIG_SIDE).permute(1, 2, 0).numpy()


def fitted(
    path: str, kind: Image.Resampling = Image.Resampling.BILINEAR, draft: bool = False
) -> np.ndarray:
    """Cut out the middle square and scale it by Pillow; of a half size, the same square."""
    image = Image.open(path)
    width, height = image.size
    if draft:
        image.draft("RGB", (BIG_SIDE, BIG_SIDE))
    k, left = width / image.width, (width - height) // 2
    box = left / k, 0, (left + height) / k, height / k
    return np.asarray(image.convert("RGB").resize((BIG_SIDE, BIG_SIDE), kind, box))


# fastai is large, and a large process forks slowly: the part that imports it comes last
PARTS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "start-up": ("The first batch", start_up),
    "small": ("Small files", small),
    "cached": ("Decoded before", cached),
    "limits": ("The limit: decoding alone", limits),
    "quality": ("Quality", quality),
    "big": ("Big files", big),
}


def main() -> None:
    """Measure the parts named in the command line, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--folder", type=Path, help="where the JPEGs are kept for the next run")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    sections = [
        f"Batches of {BATCH}, epochs anew but the files in the system's memory. Median and "
        "quartiles; ratios (×: times the speed) are of paired passes. CPU s: of all processes."
    ]
    with TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for part in [name for name in PARTS if name in (given.parts or PARTS)]:
            title, measured = PARTS[part]
            began = time.perf_counter()
            sections += [f"## {title}", *measured(folder)]
            sections.append(f"({time.perf_counter() - began:.0f} s)")
    chosen = [name for name in PARTS if name in given.parts]
    command = " ".join(["python benchmarks/decoding.py", *chosen])
    report("-".join(["decoding", *chosen]), "From JPEG files to batches", command, *sections)


if __name__ == "__main__":
    main()
