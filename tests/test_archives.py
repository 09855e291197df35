"""Archives, hostile, broken and good ones: all of it appears at once, or nothing does."""

import bz2
import errno
import gzip
import io
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.data import archives
from pellucid.data.archives import part_of, remove_parts, unpack, why_refused
from pellucid.errors import DataError, DataNotFound, PellucidError

Member = tuple[str, bytes]

# ── making archives ─────────────────────────────────────────────────────────────────────────────


def tar(*members: Member | tarfile.TarInfo, kind: str = "", layout: int = tarfile.PAX_FORMAT):
    """Pack members as they are: (name, content), a name with / at its end, or a header."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{kind}", format=layout) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            name, content = member
            head = tarfile.TarInfo(name)
            head.size = len(content)
            head.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            file.addfile(head, io.BytesIO(content))
    return packed.getvalue()


def zipped(*members: Member | tuple[zipfile.ZipInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return packed.getvalue()


PACK: dict[str, Callable[..., bytes]] = {"tar": tar, "zip": zipped}


def header(name: str, kind: bytes, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    head = tarfile.TarInfo(name)
    head.type, head.linkname, head.mode = kind, link, mode
    return head


def zip_entry(name: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, mode << 16
    return entry


@pytest.fixture
def room(tmp_path) -> Path:
    """A folder with something that must not change, and one below it to unpack in."""
    (tmp_path / "precious").write_text("untouched")
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(room: Path, content: bytes, **limits: float) -> str:
    """Unpack what must not be; return what was said. Nothing may be left, inside or outside."""
    archive = room / "archive"
    archive.write_bytes(content)
    before = tree(room.parent)
    with pytest.raises(DataError) as caught:
        unpack(archive, room / "out", **limits)
    assert tree(room.parent) == before
    text = str(caught.value)
    assert str(archive) in text and "  do:  " in text
    return text


# ── hostile ones ────────────────────────────────────────────────────────────────────────────────

NAMES = {
    "upwards": ("../evil", "leads upwards"),
    "upwards in the middle": ("a/../../evil", "leads upwards"),
    "upwards but within": ("a/../b", "leads upwards"),
    "absolute": ("/tmp/pellucid-evil", "absolute"),
    "absolute with two slashes": ("//host/evil", "absolute"),
    "too deep": ("d/" * 100 + "evil", "more than 64 folders"),
    "too long": ("x" * 300, "File name too long"),
}


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_leads_astray_is_refused(room, case, pack):
    name, why = NAMES[case]
    assert why in refused(room, PACK[pack](("good", b"1"), (name, b"evil")))


def chain(length: int) -> list[tarfile.TarInfo]:
    """Links that resolve to a name longer than the system can resolve (CVE-2025-4517)."""
    long = "d" * 247
    members = []
    for i in range(length):
        members.append(header("/".join([long] * i + [long]), tarfile.DIRTYPE))
        members.append(header("/".join([long] * i + [f"l{i}"]), tarfile.SYMTYPE, long))
    return [*members, header("escape", tarfile.SYMTYPE, "/".join(f"l{i}" for i in range(length)))]


SPECIAL = {
    "symlink outside": [header("evil", tarfile.SYMTYPE, "/etc/passwd")],
    "symlink within": [("a", b"1"), header("evil", tarfile.SYMTYPE, "a")],
    "file through a symlink": [header("d", tarfile.SYMTYPE, ".."), ("d/precious", b"evil")],
    "chain of symlinks": chain(16),
    "hard link outside": [header("evil", tarfile.LNKTYPE, "../precious")],
    "hard link within": [("a", b"1"), header("evil", tarfile.LNKTYPE, "a")],
    "character device": [header("evil", tarfile.CHRTYPE)],
    "block device": [header("evil", tarfile.BLKTYPE)],
    "pipe": [header("evil", tarfile.FIFOTYPE)],
    "kind nobody knows": [header("evil", b"Z")],
    "sparse file": [header("evil", tarfile.GNUTYPE_SPARSE)],
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_neither_file_nor_folder_is_refused_in_a_tar(room, case):
    text = refused(room, tar(*SPECIAL[case], layout=tarfile.GNU_FORMAT))
    assert "it is a link, a device, a pipe or a sparse file" in text


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
def test_what_is_neither_file_nor_folder_is_refused_in_a_zip(room, kind):
    content = zipped((zip_entry("evil", kind | 0o777), b"../precious"), ("evil/x", b"evil"))
    assert "it is a link, a device or a pipe" in refused(room, content)


@pytest.mark.parametrize("pack", PACK)
def test_no_permissions_are_taken_over(room, pack):
    mode = stat.S_IFREG | 0o7777
    head = header("d/run", tarfile.REGTYPE, mode=0o7777)
    content = tar(head) if pack == "tar" else zipped((zip_entry("d/run", mode), b""))
    (room / "archive").write_bytes(content)
    found = (unpack(room / "archive", room / "out") / "run").stat().st_mode
    assert not found & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX | 0o111)


CLASHES = {
    "the same name twice": [("a", b"1"), ("a", b"2")],
    "the same name in other words": [("d/a", b"1"), ("./d//a", b"2")],
    "a file in the place of a folder": [("a/b", b"1"), ("a", b"2")],
    "a member under a file": [("a", b"1"), ("a/b", b"2")],
    "a folder in the place of a file": [("a", b"1"), ("a/", b"")],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile, when we make it
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("case", CLASHES)
def test_two_members_for_one_place_are_refused(room, case, pack):
    assert "its place is taken" in refused(room, PACK[pack](("z", b"0"), *CLASHES[case]))


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("names", [("d/a", "d/A"), ("cat/1", "Cat/2")])
def test_names_that_differ_in_capitals_alone_are_refused_where_they_clash(
    room, names, pack, monkeypatch
):
    content = PACK[pack](*((name, b"1") for name in names))
    (room / "archive").write_bytes(content)
    assert len(tree(unpack(room / "archive", room / "kept"))) > 1

    # a file system that does not tell capitals from small letters
    for function in ("open", "mkdir"):
        real = getattr(Path, function)
        monkeypatch.setattr(
            Path,
            function,
            lambda path, *args, real=real, **kwargs: real(
                Path(str(path).replace("A", "a").replace("Cat", "cat")), *args, **kwargs
            ),
        )
    shutil.rmtree(room / "kept")
    assert "maybe in other letters" in refused(room, content)


def test_folders_may_be_told_twice(room):
    (room / "archive").write_bytes(tar(("./", b""), ("d/", b""), ("d/", b""), ("d/a", b"1")))
    assert tree(unpack(room / "archive", room / "out")) == {"a": b"1"}


@pytest.mark.parametrize("name", ["a\0b", "\0", "d\0/../../evil"])
def test_a_name_with_a_nul_is_refused(room, name):
    head = tarfile.TarInfo("x")
    head.pax_headers = {"path": name}
    assert "NUL" in refused(room, tar(head))
    stand_in = "~".join(name.split("\0"))  # zipfile would cut it at the NUL
    content = zipped((stand_in, b"1")).replace(stand_in.encode(), name.encode())
    assert "NUL" in refused(room, content)


def test_a_name_that_is_no_unicode_is_refused(room):
    packed = tar(("caf\udce9", b"1"), layout=tarfile.GNU_FORMAT)
    assert "no Unicode" in refused(room, packed)
    packed = zipped(("café", b"1")).replace("café".encode(), b"caf\xe9\xff")
    assert "is broken" in refused(room, packed)


@pytest.mark.parametrize("pack", PACK)
def test_a_member_without_a_name_is_refused(room, pack):
    assert "no name" in refused(room, PACK[pack]((".", b"1")))


@pytest.mark.parametrize(
    "name",
    ["C:/evil", "C:evil", "a\\..\\evil", "\\evil", "CON", "d/nul.txt", "com1", "LPT9.x", "COM¹",
     "aux .txt", "conin$", "d/name.", "d/name ", "file:stream", "what?", "a*", "tab\there", "a|b",
     "d./e"],
)  # fmt: skip
def test_names_that_windows_takes_for_something_else_are_refused_there(name):
    assert why_refused(name, windows=True) == "its name is none on Windows"
    assert why_refused(name, windows=False) == ""


@pytest.mark.parametrize(
    "name", ["console", "d/com10", "nullify.txt", "./a", "a//b", "d/", "ü.jpg"]
)
def test_names_that_are_good_anywhere_are_not_refused(name):
    assert why_refused(name, windows=True) == why_refused(name, windows=False) == ""


# ── too much ────────────────────────────────────────────────────────────────────────────────────


def claiming(size: int) -> bytes:
    """Return the start of a tar whose member claims a size."""
    head = tarfile.TarInfo("huge")
    head.size = size
    return head.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [4 << 30, 1 << 50, 1 << 62])
def test_a_size_is_not_believed_before_anything_is_written(room, size):
    assert "would become more than" in refused(room, claiming(size) + bytes(1024))
    assert "more than the disk has left" in refused(
        room, claiming(1 << 50) + bytes(1024), max_ratio=1e15, max_bytes=1 << 60
    )


def test_a_negative_size_is_refused(room):
    text = refused(room, claiming(-1 << 40) + bytes(1024))
    assert "is broken" in text or "negative" in text


def test_a_size_is_not_believed_in_a_zip_either(room):
    honest = zipped(("huge", b"1" * 1000))
    at = honest.rindex(b"PK\1\2") + 24  # the uncompressed size in the directory
    lying = honest[:at] + struct.pack("<I", 0xFFFF_FFF0) + honest[at + 4 :]
    assert "would become more than" in refused(room, lying)
    small = honest[:at] + struct.pack("<I", 10) + honest[at + 4 :]
    assert "is broken" in refused(room, small)


def zeros(n_bytes: int) -> bytes:
    """Return a tar, packed twice as bombs are, of a file of zeros."""
    packed = io.BytesIO()
    block = bytes(1 << 20)
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        head = tarfile.TarInfo("zeros")
        head.size = n_bytes
        file.write(head.tobuf())
        for _ in range(n_bytes >> 20):
            file.write(block)
    return packed.getvalue()


def test_a_bomb_does_not_go_off(room):
    assert "would become more than" in refused(room, zeros(70 << 20))
    bomb = bz2.compress(claiming(70 << 20) + bytes(70 << 20) + bytes(1024), 9)
    assert len(bomb) * 1e5 < 70 << 20
    assert "would become more than" in refused(room, bomb)


def test_a_bomb_in_a_zip_does_not_go_off(room):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_BZIP2) as file, file.open("zeros", "w") as member:
        for _ in range(80):
            member.write(bytes(1 << 20))
    assert "would become more than" in refused(room, packed.getvalue())


def test_a_bomb_behind_the_last_member_does_not_go_off(room, monkeypatch):
    monkeypatch.setattr(archives, "_SMALL", 1 << 20)
    content = gzip.compress(tar(("a", b"1")) + bytes(8 << 20))
    assert "far more bytes come out" in refused(room, content)


@pytest.mark.parametrize("pack", PACK)
def test_more_entries_than_allowed_are_refused(room, pack):
    members = [(f"d/{i}", b"") for i in range(20)]
    packed = PACK[pack](*members)
    assert "more than 20 files and folders" in refused(room, packed, max_entries=20)
    (room / "archive").write_bytes(packed)
    assert len(tree(unpack(room / "archive", room / "out", max_entries=21))) == 20


@pytest.mark.parametrize("pack", PACK)
def test_empty_entries_count_too(room, pack, monkeypatch):
    monkeypatch.setattr(archives, "_SMALL", 10_000)  # of 64 MiB, which a million would be beyond
    members = [(f"{i}", b"") for i in range(100)]
    packed = PACK[pack](*members)
    packed = lzma.compress(packed) if pack == "tar" else packed
    assert "would become more than" in refused(room, packed, max_ratio=2)


def test_bytes_are_limited_whatever_the_ratio(room):
    packed = tar(("a", bytes(6000)), ("b", bytes(6000)))
    assert "more than 10,000" in refused(room, packed, max_bytes=10_000)


def test_a_remark_of_gigabytes_is_not_read(room):
    head = header("x", tarfile.XHDTYPE)
    head.size = 1 << 40
    assert "longer than 1 MiB" in refused(room, head.tobuf(tarfile.GNU_FORMAT) + bytes(4096))


@pytest.mark.timeout(20)
def test_a_map_of_holes_without_end_is_not_read_for_ever(room):
    head = tarfile.TarInfo("x")
    head.size = 512
    head.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    content = head.tobuf(tarfile.PAX_FORMAT) + b"9999\n".ljust(512, b"1")
    assert "is broken" in refused(room, content)


# ── broken ──────────────────────────────────────────────────────────────────────────────────────

GOOD: list[Member] = [("d/a.txt", bytes(range(256)) * 9), ("d/e/b", b""), ("d/e/ü", b"x" * 999)]

PACKED = {
    "tar": tar(*GOOD),
    "tar of GNU": tar(*GOOD, layout=tarfile.GNU_FORMAT),
    "tar of old": tar(*GOOD[:2], layout=tarfile.USTAR_FORMAT),
    "tar.gz": tar(*GOOD, kind="gz"),
    "tar.bz2": tar(*GOOD, kind="bz2"),
    "tar.xz": tar(*GOOD, kind="xz"),
    "zip": zipped(*GOOD),
}


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_cut_off_anywhere_is_broken(room, kind):
    content = PACKED[kind]
    whole = len(content) if "." in kind or kind == "zip" else len(content.rstrip(b"\0"))
    cuts = {0, 1, 5, 300, 511, 512, 513, 1024, 2560, whole - 1, *range(0, whole, whole // 12)}
    for cut in sorted(cut for cut in cuts if cut < whole):
        assert "is broken" in refused(room, content[:cut])


@pytest.mark.parametrize("kind", PACKED)
def test_a_flipped_byte_is_found_where_there_is_a_checksum(room, kind):
    content = PACKED[kind]
    good = {name.removeprefix("d/"): data for name, data in GOOD}
    for i in range(0, len(content), max(1, len(content) // 60)):
        (room / "archive").write_bytes(content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :])
        try:
            found = tree(unpack(room / "archive", room / "out"))
        except DataError:
            assert sorted(path.name for path in room.iterdir()) == ["archive"]
            continue
        shutil.rmtree(room / "out")
        if kind in ("tar.gz", "tar.xz", "tar.bz2", "zip"):  # a plain tar has none over its data
            assert {name: data for name, data in found.items() if data is not None} == good


def test_a_header_that_is_broken_is_not_taken_for_the_end(room):
    content = bytearray(tar(("a", b"1"), ("b", b"2")))
    content[1024] ^= 1  # the name of b
    assert "bad checksum" in refused(room, bytes(content))


def test_a_bad_checksum_in_a_zip_is_found(room):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a", b"four score and seven")
    assert "Bad CRC-32" in refused(room, packed.getvalue().replace(b"score", b"Score"))


def test_an_encrypted_member_is_refused(room):
    content = bytearray(zipped(("a", b"secret")))
    for start, offset in ((content.index(b"PK\3\4"), 6), (content.rindex(b"PK\1\2"), 8)):
        content[start + offset] |= 1
    assert "it is encrypted" in refused(room, bytes(content))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "cut off, or not an archive"),
        (b"just some words", "not an archive"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page (HTML)"),
        (bytes(10_240), "holds no files"),
        (gzip.compress(b"words" * 1000), "or not an archive"),
        (tar(("d/", b"")), "holds no files"),
        (zipped(), "holds no files"),
    ],
    ids=["nothing", "words", "web page", "zeros", "packed words", "empty tar", "empty zip"],
)
def test_what_is_no_archive_says_so(room, content, why):
    assert why in refused(room, content)


# ── what stands in the way ──────────────────────────────────────────────────────────────────────


def test_an_archive_that_is_not_there_and_a_folder_that_is(room):
    with pytest.raises(DataNotFound, match="no archive"):
        unpack(room / "nothing.zip", room / "out")
    (room / "archive").write_bytes(PACKED["zip"])
    (room / "out").mkdir()
    with pytest.raises(DataError, match="is there already"):
        unpack(room / "archive", room / "out")
    assert list((room / "out").iterdir()) == []


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"),
                                   KeyboardInterrupt(), RuntimeError("slip")])  # fmt: skip
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_whatever_breaks_in_leaves_nothing_behind(room, kind, at, fault, monkeypatch):
    archive, left, real = room / "archive", [at], Path.open

    def opening(path, *args, **kwargs):
        if args[:1] == ("xb",):
            left[0] -= 1
            if not left[0]:
                raise fault
        return real(path, *args, **kwargs)

    archive.write_bytes(PACKED[kind])
    monkeypatch.setattr(Path, "open", opening)
    with pytest.raises((type(fault), PellucidError)) as caught:
        unpack(archive, room / "out")
    assert [path.name for path in room.iterdir()] == ["archive"]
    if isinstance(fault, OSError):
        assert "No space left on device\n  do:  make room there" in str(caught.value)
    monkeypatch.undo()
    assert len(tree(unpack(archive, room / "out"))) == 4


def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_nothing_behind(room):
    resource = pytest.importorskip("resource")
    (room / "archive").write_bytes(tar(("a", b"1"), ("b", bytes(500_000))))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(DataError, match="could not be unpacked"):
            unpack(room / "archive", room / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in room.iterdir()] == ["archive"]


def test_leftovers_are_told_from_everything_else(tmp_path):
    mine = [part_of(tmp_path / "a"), part_of(part_of(tmp_path / "a"))]
    others = [part_of(tmp_path / name) for name in ("b", "a.b", "xa")]
    others += [tmp_path / name for name in ("a", ".a", ".a.part", ".a.lock", ".a.0123456g.part")]
    for path in mine + others:
        path.mkdir()
        (path / "file").touch()
    remove_parts(tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == sorted(others)
    remove_parts(tmp_path / "nowhere" / "a")


# ── good ones ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", PACKED)
def test_a_single_folder_at_the_top_becomes_the_folder(room, kind):
    (room / "no ending").write_bytes(PACKED[kind])
    found = tree(unpack(room / "no ending", room / "new" / "out"))
    wanted = {"a.txt": GOOD[0][1], "e": None, "e/b": b"", "e/ü": GOOD[2][1]}
    if kind == "tar of old":
        del wanted["e/ü"]
    assert found == wanted
    assert sorted(path.name for path in room.iterdir()) == ["new", "no ending"]
    assert [path.name for path in (room / "new").iterdir()] == ["out"]


def test_several_things_at_the_top_stay_as_they_are(room):
    (room / "archive").write_bytes(tar(("d/a", b"1"), ("b", b"2")))
    assert tree(unpack(room / "archive", room / "out")) == {"d": None, "d/a": b"1", "b": b"2"}


def test_a_file_alone_at_the_top_stays_in_its_folder(room):
    (room / "archive").write_bytes(zipped(("b", b"2")))
    assert tree(unpack(room / "archive", room / "out")) == {"b": b"2"}


def test_permissions_are_those_of_any_new_file(room):
    (room / "archive").write_bytes(PACKED["tar"])
    unpack(room / "archive", room / "out")
    (room / "file").touch()
    (room / "folder").mkdir()
    for made, like in (("out", "folder"), ("out/e", "folder"), ("out/a.txt", "file")):
        assert (room / made).stat().st_mode == (room / like).stat().st_mode


PART = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"),
    min_size=1,
    max_size=12,
).filter(lambda part: part.strip(".") != "")
TREES = st.dictionaries(
    st.lists(PART, min_size=1, max_size=4).map("/".join), st.binary(max_size=2000), min_size=1
).filter(
    lambda files: not any(a != b and f"{b}/".startswith(f"{a}/") for a in files for b in files)
)


@settings(max_examples=40, deadline=None)
@given(files=TREES, kind=st.sampled_from(["", "gz", "bz2", "xz", "zip"]))
def test_any_tree_comes_out_as_it_went_in(files, kind, tmp_path_factory):
    room = tmp_path_factory.mktemp("room")
    members = [(f"top/{name}", content) for name, content in files.items()]
    (room / "archive").write_bytes(zipped(*members) if kind == "zip" else tar(*members, kind=kind))
    out = unpack(room / "archive", room / "out")
    found = {name: content for name, content in tree(out).items() if content is not None}
    assert found == files
    assert not [path for path in room.iterdir() if re.search(r"\.part$", path.name)]
