"""Image files: whole ones decoded as they are meant, broken ones refused with a word on why.

Each test that decodes runs with simplejpeg, where it is installed, and without it.
"""

import errno
import io
import os
import pickle
import re
import resource
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from pellucid.data import images
from pellucid.data.files import FileNames, scan
from pellucid.data.images import FITS, ImageFiles, channels_first, decode_image, image_size
from pellucid.errors import DataError, SetupError, UnknownName

FAST = images._simplejpeg()
WITH = [pytest.param(FAST, id="simplejpeg", marks=[pytest.mark.skipif(not FAST, reason="none")])]
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (60, 80, 3), np.uint8)
FORMATS = {
    "JPEG": {"quality": 90},
    "progressive JPEG": {"progressive": True},
    "PNG": {},
    "WebP": {"quality": 90},
    "lossless WebP": {"lossless": True},
    "GIF": {},
    "TIFF": {},
    "LZW TIFF": {"compression": "tiff_lzw"},
    "deflated TIFF": {"compression": "tiff_deflate"},
    "BMP": {},
}
randomly = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)


@pytest.fixture(params=[*WITH, pytest.param(None, id="Pillow")], autouse=True)
def decoder(request, monkeypatch):
    monkeypatch.setattr(images, "_simplejpeg", lambda: request.param)
    return request.param


def encoded(pixels, kind="PNG", **options):
    """Return an array or a Pillow image as the bytes of a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind.split()[-1], **{**FORMATS.get(kind, {}), **options})
    return file.getvalue()


def decoded(content, size=None, fit="crop"):
    """Decode bytes to a size, their own by default."""
    if size is None:
        with Image.open(io.BytesIO(content)) as image:
            size = image.height, image.width
    out = np.full((*size, 3), 77, np.uint8)
    decode_image(content, out, fit)
    return out


def smooth(height, width, seed=0):
    """Make a picture whose neighbouring pixels are alike, as a photograph's are."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(3, height, width))
    spectrum = np.fft.rfft2(noise[:1] + noise / 4)  # colours mostly change together
    far = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    waves = np.fft.irfft2(
        spectrum / np.maximum(far, 1 / max(height, width)) ** 1.3, (height, width)
    )
    waves = (waves - waves.mean()) / max(waves.std(), 1e-9)
    return np.clip(127 + 50 * waves, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def apart(a, b):
    return np.abs(a.astype(int) - b.astype(int))


def psnr(a, b):
    return 10 * np.log10(255**2 / max((apart(a, b) ** 2).mean(), 1e-9))


def refusal(root, name="a.jpg", content=None, **options):
    """Return the message of a file that must be refused; check what every such message says."""
    if content is not None:
        Path(root, name).write_bytes(content)
    files = ImageFiles(FileNames(root, [name]), None, 16, **options)
    out = np.full((16, 16, 3), 77, np.uint8)
    reason = files.read(0, out)
    assert reason and not out.any() and "\n" not in reason and str(root) not in reason
    with pytest.raises(DataError) as caught:
        files[0]
    text = str(caught.value)
    text.encode()  # any terminal prints it
    first, saw, do = text.splitlines()
    assert first.startswith(f"The file {root}/") and first.endswith("cannot be read as an image.")
    assert saw == f"  saw: {reason}" and "object at" not in saw
    assert re.search(r'do:  mend or remove it, or .*bad="skip"', do)
    return text


# ── whole and cut short ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_image_is_decoded_as_pillow_does(kind):
    content = encoded(NOISE, kind)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(decoded(content), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_cut_short_is_refused_never_half_decoded(kind, percent, tmp_path):
    content = encoded(NOISE, kind)
    text = refusal(tmp_path, content=content[: len(content) * percent // 100])
    assert re.search("cut short|the file is empty", text)
    for size in ((60, 80), (15, 20)):  # as it is, and decoded at less than its size
        with pytest.raises((ValueError, OSError, SyntaxError)):
            decoded(content[: len(content) * percent // 100], size)


@pytest.mark.parametrize("kind", FORMATS)
def test_without_its_last_bytes_an_image_is_whole_or_refused(kind):
    content = encoded(NOISE, kind)
    whole, tails = decoded(content), set()
    for n in range(1, 40):
        try:
            assert np.array_equal(decoded(content[:-n], (60, 80)), whole)
            tails.add(n)
        except (ValueError, OSError, SyntaxError):
            pass
    # checksums and end marks, which hold no pixels and which Pillow does not ask for
    assert tails <= set(range(1, {"PNG": 21, "GIF": 3}.get(kind, 1)))


def test_pillow_is_left_strict():
    decoded(encoded(NOISE, "JPEG"))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG"])
@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_decoded_or_refused(kind, seed, tmp_path):
    content = bytearray(encoded(NOISE, kind))
    rng = np.random.default_rng(seed)
    content[rng.integers(2, len(content) - 2)] ^= 1 << rng.integers(8)
    (tmp_path / "a.jpg").write_bytes(content)
    for size in (16, (60, 80)):
        files = ImageFiles(scan(tmp_path), None, size)
        out = np.empty(files.shape, np.uint8)
        if reason := files.read(0, out):
            assert not out.any()
            assert "broken or cut short" in reason or "no image" in reason or "pixels" in reason


@pytest.mark.skipif(not FAST, reason="Pillow passes over what libjpeg only warns of")
def test_simplejpeg_tells_of_damage_that_pillow_passes_over(tmp_path, decoder):
    content = bytearray(encoded(NOISE, "JPEG"))
    content[len(content) // 2] ^= 0xFF
    if decoder:
        assert "Corrupt JPEG data" in refusal(tmp_path, content=bytes(content))


# ── what is no image ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html><html>404</html>", b"hello\n", b"\xff\xd8\xff", b"\0" * 5000, b"\x89PNG\r\n"],
    ids=["html", "text", "three bytes", "zeros", "six bytes"],
)
def test_what_is_no_image_is_refused(content, tmp_path):
    assert "no image, of a kind that Pillow does not know, or cut short" in refusal(
        tmp_path, content=content
    )


def test_an_empty_file_is_refused(tmp_path):
    assert "saw: the file is empty" in refusal(tmp_path, content=b"")


def test_a_program_is_not_run(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert "PostScript, a program" in refusal(tmp_path, content=script)


def test_the_name_does_not_tell_the_kind(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(NOISE, "PNG"))
    (tmp_path / "b.png").write_bytes(encoded(NOISE, "JPEG"))
    files = ImageFiles(scan(tmp_path), None, (60, 80))
    assert np.array_equal(files[0][0].permute(1, 2, 0), NOISE)
    assert np.array_equal(files[1][0].permute(1, 2, 0), decoded(encoded(NOISE, "JPEG")))


def test_folders_and_links_named_as_images_are_refused(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert "Is a directory" in refusal(tmp_path, "folder.jpg")
    assert "it is gone, or a link that leads nowhere" in refusal(tmp_path, "link.jpg")
    assert "symbolic links" in refusal(tmp_path, "loop.jpg")


def test_a_file_deleted_after_the_scan_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(NOISE))
    files = ImageFiles(scan(tmp_path), None, 16)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=rf"(?s){tmp_path}/a\.png cannot.*it is gone.*skip"):
        files[0]


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a.jpg")

    monkeypatch.setattr(images.os, "open", refuse)
    assert "saw: Permission denied" in refusal(tmp_path)


@pytest.mark.parametrize(
    "trouble",
    [OSError(errno.EMFILE, "Too many open files"), MemoryError(), ImportError("no PIL")],
    ids=lambda trouble: type(trouble).__name__,
)
def test_the_machines_trouble_is_not_the_files(trouble, tmp_path, monkeypatch):
    def fail(*_):
        raise trouble

    monkeypatch.setattr(images, "_content", fail)
    with pytest.raises(type(trouble)):
        ImageFiles(FileNames(tmp_path, ["a.jpg"]), None, 16).read(0, np.empty((16, 16, 3), "u1"))


@pytest.mark.parametrize(
    "name", [os.fsdecode(b"\xff\xfe.jpg"), "a" * 251 + ".jpg", "ü\n ?.jpg"], ids=ascii
)
def test_any_name_that_a_file_can_have_is_read(name, tmp_path):
    Path(tmp_path, name).write_bytes(encoded(NOISE, "JPEG"))
    assert ImageFiles(scan(tmp_path), None, 16)[0][0].shape == (3, 16, 16)
    if "\n" not in name:
        assert "the file is empty" in refusal(tmp_path, name, b"")


@pytest.mark.parametrize("n", [1, 65_535, 65_536, 65_537, 200_000])
def test_files_of_any_length_are_read_whole(n, tmp_path):
    content = RNG.bytes(n)
    (tmp_path / "a").write_bytes(content)
    assert images._content(str(tmp_path / "a")) == content


# ── bombs ───────────────────────────────────────────────────────────────────────────────────────


def png(width, height, depth, colour, rows):
    """Write a PNG by hand; `rows` begin with the number of their filter."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def resized_header(content, height, width):
    """Write another size into the header of a JPEG."""
    at = content.index(b"\xff\xc0")
    return content[: at + 5] + struct.pack(">HH", height, width) + content[at + 9 :]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP"])
def test_a_bomb_is_refused_before_it_is_unpacked(kind, tmp_path):
    tiny = NOISE[:8, :8]
    content = {
        "PNG": lambda: png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)),
        "JPEG": lambda: resized_header(encoded(NOISE, "JPEG"), 20_000, 20_000),
        "GIF": lambda: b"GIF89a" + struct.pack("<HH", 20_000, 20_000) + encoded(tiny, "GIF")[10:],
        "BMP": lambda: (
            (c := encoded(tiny, "BMP"))[:18] + struct.pack("<ii", 20_000, 20_000) + c[26:]
        ),
        "TIFF": lambda: encoded(tiny, "TIFF").replace(
            struct.pack("<HHIHH", 256, 4, 1, 8, 0), struct.pack("<HHII", 256, 4, 1, 10**9)
        ),
    }[kind]()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert "it has more than 178,956,970 pixels" in refusal(tmp_path, content=content)
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


# ── modes ───────────────────────────────────────────────────────────────────────────────────────

ONE = RNG.integers(0, 256, (20, 30), np.uint8)
TWO = RNG.integers(0, 256, (20, 30, 2), np.uint8)
THREE, FOUR = NOISE[:20, :30], RNG.integers(0, 256, (20, 30, 4), np.uint8)
DEEP = RNG.integers(0, 65536, (20, 30), np.uint16)
PALETTE = RNG.integers(0, 256, (256, 3), np.uint8)


def grey(values):
    return np.repeat(values[..., None], 3, 2).astype(np.uint8)


def on_white(colours, alpha):
    alpha = alpha[..., None] / 255
    return colours * alpha + 255 * (1 - alpha)


def with_palette(mode, indices):
    image = Image.frombytes(mode, (30, 20), indices.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


def from_ycbcr(y, cb, cr):
    y, cb, cr = (x.astype(float) for x in (y, cb - 128.0, cr - 128.0))
    rgb = y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb
    return np.clip(np.stack(rgb, 2), 0, 255)


def from_cmyk(cmyk):
    return (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255


def deep_png():
    rows = RNG.integers(0, 65536, (20, 30, 3)).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    return png(30, 20, 16, 2, data), rows >> 8


def deep_pgm():
    return b"P5 30 20 65535\n" + DEEP.astype(">u2").tobytes()


FLAT = np.tile(np.array([[[30, 90, 200, 40]]], np.uint8), (20, 30, 1))
CUT = np.where(ONE < 100, 0, 255)  # the alpha of a palette of which 100 colours are transparent
MODES = {
    "1 PNG": lambda: (encoded(Image.fromarray(ONE > 99)), grey((ONE > 99) * 255), 0),
    "1 TIFF": lambda: (encoded(Image.fromarray(ONE > 99), "TIFF"), grey((ONE > 99) * 255), 0),
    "L PNG": lambda: (encoded(ONE), grey(ONE), 0),
    "L BMP": lambda: (encoded(ONE, "BMP"), grey(ONE), 0),
    "L JPEG": lambda: (encoded(FLAT[..., 0], "JPEG"), grey(FLAT[..., 0]), 1),
    "LA PNG": lambda: (encoded(TWO), on_white(grey(TWO[..., 0]), TWO[..., 1]), 1),
    "P PNG": lambda: (encoded(with_palette("P", ONE)), PALETTE[ONE], 0),
    "P GIF": lambda: (encoded(with_palette("P", ONE), "GIF"), PALETTE[ONE], 0),
    "PA TIFF": lambda: (
        encoded(with_palette("PA", TWO), "TIFF"),
        on_white(PALETTE[TWO[..., 0]], TWO[..., 1]),
        1,
    ),
    "P PNG, one colour transparent": lambda: (
        encoded(with_palette("P", ONE), transparency=7),
        np.where((ONE == 7)[..., None], 255, PALETTE[ONE]),
        0,
    ),
    "P PNG, many colours transparent": lambda: (
        encoded(with_palette("P", ONE), transparency=bytes(100)),
        on_white(PALETTE[ONE], CUT),
        1,
    ),
    "P GIF, transparent": lambda: (
        encoded(with_palette("P", ONE), "GIF", transparency=7),
        np.where((ONE == 7)[..., None], 255, PALETTE[ONE]),
        0,
    ),
    "L PNG, one grey transparent": lambda: (
        encoded(Image.fromarray(ONE), transparency=7),
        grey(np.where(ONE == 7, 255, ONE)),
        0,
    ),
    "RGB PNG, one colour transparent": lambda: (
        encoded(Image.fromarray(THREE), transparency=tuple(THREE[3, 4].tolist())),
        np.where((THREE[3, 4] == THREE).all(2, keepdims=True), 255, THREE),
        0,
    ),
    "RGB PNG": lambda: (encoded(THREE), THREE, 0),
    "RGBA PNG": lambda: (encoded(FOUR), on_white(FOUR[..., :3], FOUR[..., 3]), 1),
    "RGBA WebP": lambda: (
        encoded(FOUR, "lossless WebP", exact=True),
        on_white(FOUR[..., :3], FOUR[..., 3]),
        1,
    ),
    "CMYK TIFF": lambda: (encoded(Image.fromarray(FOUR, "CMYK"), "TIFF"), from_cmyk(FOUR), 1.5),
    "Adobe's inverted CMYK JPEG": lambda: (
        encoded(Image.fromarray(FLAT, "CMYK"), "JPEG", quality=100),
        from_cmyk(FLAT),
        3,
    ),
    "YCbCr TIFF": lambda: (
        encoded(Image.fromarray(THREE, "YCbCr"), "TIFF"),
        from_ycbcr(*np.moveaxis(THREE, 2, 0)),
        2,
    ),
    "YCbCr JPEG": lambda: (
        encoded(Image.fromarray(FLAT[..., :3], "YCbCr"), "JPEG", quality=100),
        from_ycbcr(*np.moveaxis(FLAT[..., :3], 2, 0)),
        3,
    ),
    "RGB JPEG": lambda: (encoded(FLAT[..., :3], "JPEG", keep_rgb=True), FLAT[..., :3], 2),
    "I;16 PNG": lambda: (encoded(DEEP), grey(DEEP >> 8), 0),
    "I;16 TIFF": lambda: (encoded(DEEP, "TIFF"), grey(DEEP >> 8), 0),
    "I PGM": lambda: (deep_pgm(), grey(DEEP >> 8), 0),
    "RGB PNG of 16 bits": lambda: (*deep_png(), 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    content, expected, near = MODES[mode]()
    assert apart(decoded(content), np.round(expected)).max() <= near


@pytest.mark.parametrize(
    ("mode", "values", "reason"),
    [("F", ONE.astype(np.float32), "floats"), ("I", ONE.astype(np.int32), "32 bits")],
)
def test_pixels_without_a_fixed_range_are_refused(mode, values, reason, tmp_path):
    assert Image.fromarray(values).mode == mode
    assert f"{reason}, which have no fixed range; save it as" in refusal(
        tmp_path, content=encoded(values, "TIFF")
    )


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_colours_of_less_resolution_are_decoded(subsampling):
    picture = smooth(64, 48)
    content = encoded(picture, "JPEG", quality=98, subsampling=subsampling)
    assert apart(decoded(content), picture).mean() < 3
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(decoded(content), np.asarray(image))


def test_of_an_animation_the_first_picture_counts():
    later = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (90, 200)]
    for kind in ("GIF", "WebP", "PNG", "TIFF"):
        content = encoded(THREE // 8 * 8, kind, save_all=True, append_images=later)
        with Image.open(io.BytesIO(content)) as image:
            assert image.n_frames == 3
            assert np.array_equal(decoded(content), np.asarray(image.convert("RGB")))


# ── orientation ─────────────────────────────────────────────────────────────────────────────────

UPRIGHT = {  # what must be done to the stored pixels, by the EXIF standard
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: np.rot90,
}


def exif(turn, order="MM"):
    mark = ">" if order == "MM" else "<"
    head = order.encode() + struct.pack(mark + "HI", 42, 8)
    entry = struct.pack(mark + "HHIHH", 0x0112, 3, 1, turn, 0)
    return b"Exif\0\0" + head + struct.pack(mark + "H", 1) + entry + bytes(4)


@pytest.mark.parametrize("order", ["MM", "II"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "lossless WebP"])
@pytest.mark.parametrize("turn", UPRIGHT)
def test_an_image_lies_as_its_exif_data_say(turn, kind, order):
    stored = smooth(24, 40)
    content = encoded(stored, kind, exif=exif(turn, order))
    expected = UPRIGHT[turn](decoded(encoded(stored, kind)))
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), expected)
    assert np.array_equal(decoded(content, expected.shape[:2]), expected)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("turn", UPRIGHT)
def test_a_turned_image_is_fitted_upright(turn, fit):
    for stored, size in ((smooth(24, 40), (20, 12)), (smooth(165, 251), (36, 20))):
        lying = size[::-1] if turn > 4 else size
        expected = UPRIGHT[turn](decoded(encoded(stored, "JPEG"), lying, fit))
        found = decoded(encoded(stored, "JPEG", exif=exif(turn)), size, fit)
        assert np.array_equal(found, expected)


def test_exif_data_may_come_without_jfif():
    content = encoded(smooth(24, 40), "JPEG")
    assert content[2:4] == b"\xff\xe0"  # JFIF, 16 bytes
    data = exif(6)
    alone = content[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + content[20:]
    assert np.array_equal(decoded(alone, (40, 24)), UPRIGHT[6](decoded(content)))
    xmp = b"\xff\xe1" + struct.pack(">H", 42) + b"http://ns.adobe.com/xap/1.0/".ljust(40, b"\0")
    later = content[:2] + xmp + alone[2:]
    assert np.array_equal(decoded(later, (40, 24)), UPRIGHT[6](decoded(content)))


def test_what_only_looks_like_exif_turns_nothing():
    content = encoded(smooth(24, 40), "JPEG", comment=exif(6))
    assert np.array_equal(decoded(content, (24, 40)), decoded(encoded(smooth(24, 40), "JPEG")))


BROKEN_EXIF = {
    "nothing": b"Exif\0\0",
    "half": exif(6)[:14],
    "no order": b"Exif\0\0XX" + exif(6)[8:],
    "far": b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20),
    "many": exif(6)[:14] + b"\xff\xff" + bytes(12),
    "orientation 0": exif(0),
    "orientation 9": exif(9),
    "orientation of floats": exif(6).replace(b"\x01\x12\0\x03", b"\x01\x12\0\x0b"),
    "noise": b"Exif\0\0" + RNG.bytes(500),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "lossless WebP"])
@pytest.mark.parametrize("data", BROKEN_EXIF.values(), ids=BROKEN_EXIF.keys())
def test_broken_exif_data_do_not_fail_the_image(kind, data):
    whole = decoded(encoded(smooth(24, 40), kind))
    assert np.array_equal(decoded(encoded(smooth(24, 40), kind, exif=data), (24, 40)), whole)


def test_what_follows_a_jpeg_is_left_alone():
    content = encoded(NOISE, "JPEG")
    assert np.array_equal(decoded(content + b"garbage" * 99), decoded(content))
    assert np.array_equal(decoded(content + content), decoded(content))


# ── fitting ─────────────────────────────────────────────────────────────────────────────────────

sides = st.integers(1, 64)
sizes = st.tuples(sides, sides)
kinds = st.sampled_from(["JPEG", "PNG"])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 700)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extreme_shapes_fit(kind, size, fit):
    content = encoded(np.full((*size, 3), 200, np.uint8), kind)
    for shape in ((16, 16), (1, 1), (1, 300), (300, 1), (7, 90)):
        out = decoded(content, shape, fit)
        assert out.max() == 200 and (fit == "pad" or out.min() == 200)


@randomly
@given(sizes, sizes, st.sampled_from(FITS), kinds)
def test_a_constant_image_stays_constant(size, shape, fit, kind):
    out = decoded(encoded(np.full((*size, 3), 137, np.uint8), kind), shape, fit)
    inside = out == 137
    if fit != "pad":
        assert inside.all()
        return
    factor = min(shape[0] / size[0], shape[1] / size[1])
    inner = [max(round(n * factor), 1) for n in size]
    assert (inside | (out == 0)).all() and inside[..., 0].sum() == inner[0] * inner[1]
    for axis in (0, 1):  # in the middle, to half a pixel
        where = np.flatnonzero(inside.any(axis=(1 - axis, 2)))
        assert abs(where[0] - (shape[axis] - 1 - where[-1])) <= 1


@randomly
@given(sizes, st.sampled_from(FITS), kinds)
def test_an_image_of_the_right_size_is_only_decoded(size, fit, kind):
    content = encoded(NOISE.repeat(2, 0)[: size[0], : size[1]], kind)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(decoded(content, size, fit), np.asarray(image))


@randomly
@given(sizes, sizes)
def test_the_middle_is_cut_out(size, shape):
    across = np.linspace(0, 252, size[0])[:, None], np.linspace(0, 252, size[1])[None]
    ramps = [np.broadcast_to(ramp, size) for ramp in across]
    out = decoded(encoded(np.stack([*ramps, ramps[0]], 2).round().astype(np.uint8)), shape)
    for axis in (0, 1):
        middle = 126 if size[axis] > 1 else 0
        assert abs(out[..., axis].mean() - middle) <= 252 / max(size[axis] - 1, 1) * 0.75 + 1


def test_what_is_cut_out_has_the_shape_asked_for():
    content = encoded(NOISE)
    assert np.array_equal(decoded(content, (60, 60)), NOISE[:, 10:70])
    assert np.array_equal(decoded(content, (30, 80)), NOISE[15:45])
    framed = decoded(content, (100, 80), "pad")
    assert np.array_equal(framed[20:80], NOISE) and not framed[:20].any() and not framed[80:].any()


@pytest.mark.skipif(not FAST, reason="simplejpeg is not installed")
@randomly
@given(st.tuples(st.integers(1, 200), st.integers(1, 200)), sizes, st.sampled_from(FITS))
def test_both_engines_agree(size, shape, fit):
    content = encoded(smooth(*size), "JPEG", quality=95)
    found = []
    for engine in (None, FAST):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "_simplejpeg", lambda engine=engine: engine)
            found.append(decoded(content, shape, fit))
    assert apart(*found).max() <= 2


@pytest.mark.parametrize("size", [(384, 512), (375, 500), (501, 333)])
@pytest.mark.parametrize(("side", "least"), [(64, 40), (128, 40), (160, 36), (224, 60)])
def test_decoding_at_less_than_full_size_changes_little(size, side, least, monkeypatch):
    content = encoded(smooth(*size), "JPEG", quality=90)
    small = decoded(content, (side, side), "stretch")
    monkeypatch.setattr(images, "_shrunk", lambda *_: 1)
    assert psnr(small, decoded(content, (side, side), "stretch")) > least


def test_a_jpeg_is_decoded_as_small_as_will_do():
    def k(height, width, out, fit):
        return images._shrunk(height, width, (out, out, 3), fit)

    assert [k(375, 500, out, "crop") for out in (40, 46, 47, 93, 94, 187, 188)] == [
        8, 8, 4, 4, 2, 2, 1]  # fmt: skip
    assert k(375, 500, 188, "pad") == k(375, 500, 250, "pad") == 2
    assert k(375, 500, 187, "stretch") == 2 and k(375, 500, 188, "stretch") == 1
    assert k(1, 5000, 64, "pad") == 1


# ── the data set ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def files(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(smooth(40, 50, i), "JPEG"))
    return ImageFiles(scan(tmp_path), [3, 1, 0, 1], (16, 20))


def test_an_item_is_an_image_and_its_label(files, tmp_path):
    image, label = files[1]
    assert image.shape == (3, 16, 20) and image.dtype == torch.uint8 and label == 1
    assert image[None].is_contiguous(memory_format=torch.channels_last)
    assert len(files) == 4 and files.shape == (16, 20, 3) and files.fit == "crop"
    assert repr(files) == f"ImageFiles(4 of 16×20, {tmp_path})"
    assert ImageFiles(files.names).labels.tolist() == [0] * 4
    with pytest.raises(IndexError):
        files[4]


def test_a_part_and_a_copy_give_the_same_images(files):
    part = files.subset(np.array([3, 1]))
    assert len(part) == 2 and part.labels.tolist() == [1, 1] and part.shape == files.shape
    assert torch.equal(part[0][0], files[3][0])
    again = pickle.loads(pickle.dumps(files))
    assert torch.equal(again[2][0], files[2][0]) and again.names == files.names


def test_channels_first_makes_no_copy():
    array = torch.zeros(2, 4, 5, 3)
    assert channels_first(array).shape == (2, 3, 4, 5)
    assert channels_first(array).data_ptr() == array.data_ptr()


def test_settings_that_cannot_work_are_refused(files):
    with pytest.raises(UnknownName, match="did you mean 'crop'"):
        ImageFiles(files.names, None, 8, "crops")
    for size in (0, (8, 0), -1):
        with pytest.raises(SetupError, match=r"(?s)number of pixels.*size="):
            ImageFiles(files.names, None, size)
    with pytest.raises(DataError, match="4 files, 3 labels"):
        ImageFiles(files.names, [0, 1, 2])


def test_the_size_of_an_image_is_told_without_decoding_it(tmp_path):
    (tmp_path / "a").write_bytes(encoded(NOISE, "JPEG"))
    (tmp_path / "b").write_bytes(encoded(NOISE, "JPEG")[:20])
    assert image_size(str(tmp_path / "a")) == (60, 80)
    assert image_size(str(tmp_path / "b")) is image_size(str(tmp_path / "c")) is None


def test_the_engine_is_named(decoder):
    assert ("simplejpeg" in images.engine()) == bool(decoder)
    assert f"torch {torch.__version__}" in images.engine()


def test_threads_decode_alike_and_leave_the_filters_of_warnings_alone():
    contents = [encoded(smooth(24, 40), "PNG", exif=data) for data in BROKEN_EXIF.values()] * 8
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda content: decoded(content, (24, 40)), contents))
    assert all(np.array_equal(image, found[0]) for image in found)
    assert list(warnings.filters) == filters
