"""Files: found whatever their names, labelled, split and encoded; each slip is named."""

import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pellucid.data.files import IMAGE_EXTENSIONS, FileNames, scan
from pellucid.data.labels import (
    encode,
    folder_label,
    label_files,
    pattern_label,
    read_labels,
    vocabulary,
)
from pellucid.data.splits import split_at_random, split_by_folder, split_by_list
from pellucid.errors import DataError, DataNotFound, SetupError, UnknownName


def make(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def shown(names):
    """Return what a message or a repr says, after making sure that any terminal prints it."""
    text = str(names)
    text.encode()
    return text


# ── names ───────────────────────────────────────────────────────────────────────────────────────

LETTERS = ["train/a.jpg", "b/ü.png", "c d.gif", "e/f/g.bmp", os.fsdecode(b"h/\xff\xfe.jpg")]


@pytest.fixture
def names(tmp_path):
    return FileNames(tmp_path, LETTERS)


def test_names_are_a_sequence_of_texts(names, tmp_path):
    assert len(names) == 5 and list(names) == LETTERS and names[-1] == LETTERS[-1]
    assert names[np.int64(1)] == names[torch.tensor(1)] == "b/ü.png"
    assert (
        "c d.gif" in names
        and names.index("c d.gif") == 2
        and list(reversed(names))[4] == LETTERS[0]
    )
    assert names.root == str(tmp_path) and names.path(0) == f"{tmp_path}/train/a.jpg"
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            names[wrong]
    for wrong in ("a", 1.0, None, [[0, 1]], [0.5], [7]):
        with pytest.raises((IndexError, TypeError)):
            names[wrong]


@given(st.lists(st.integers(-5, 4), max_size=9))
def test_a_part_is_what_a_list_gives(some):
    names, array = FileNames("/data", LETTERS), np.array(LETTERS, object)
    expected = [LETTERS[i] for i in some]
    assert list(names[some]) == list(names[np.array(some, int)]) == expected
    assert list(names[torch.tensor(some, dtype=torch.int64)]) == expected
    mask = np.isin(np.arange(5), some)
    assert list(names[mask]) == list(array[mask])
    assert list(names[some][::-1][:2]) == expected[::-1][:2]


def test_names_are_equal_by_folder_and_name(names, tmp_path):
    again = FileNames(tmp_path, iter(LETTERS))
    assert names == again and hash(names) == hash(again)
    assert names[::-1][::-1] == names and names[:2] == FileNames(tmp_path, LETTERS[:2])
    assert names != names[::-1] and names != names[:4] and names != LETTERS
    assert names != FileNames("/elsewhere", LETTERS)
    assert names[:0] == names[[]] == FileNames(tmp_path, []) and not names[:0]


def test_names_survive_pickling_and_a_part_leaves_the_rest_behind(names):
    assert pickle.loads(pickle.dumps(names)) == names
    many = FileNames("/data", (f"some/folder/{i:06d}.jpg" for i in range(10_000)))
    part = pickle.dumps(many[17:20])
    assert list(pickle.loads(part)) == [f"some/folder/{i:06d}.jpg" for i in (17, 18, 19)]
    assert len(part) < 2000
    twice = many[[3, 3]]
    assert pickle.loads(pickle.dumps(twice)) == twice


def test_names_show_how_many_and_the_first():
    many = FileNames("/data/imagenette2-160", ["train/n01440764/a.JPEG"] * 13_394)
    assert repr(many) == "13,394 files under imagenette2-160, train/n01440764/a.JPEG ..."
    assert repr(many[:1]) == "1 file under imagenette2-160, train/n01440764/a.JPEG"
    assert repr(many[:0]) == "0 files under imagenette2-160"
    assert shown(FileNames("/", [LETTERS[-1]])) == r"1 file under /, h/\udcff\udcfe.jpg"


def test_a_relative_folder_is_meant_from_here(tmp_path, monkeypatch):
    make(tmp_path, "here/a.jpg")
    monkeypatch.chdir(tmp_path)
    found = scan("here")
    monkeypatch.chdir("/")
    assert found.path(0) == f"{tmp_path}/here/a.jpg" and Path(found.path(0)).exists()
    assert FileNames("/", ["a"]).path(0) == "/a"


@pytest.mark.parametrize("wrong", ["", "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(wrong):
    with pytest.raises(DataError, match="empty or contains a zero byte"):
        FileNames("/data", ["a", wrong])


MEMORY = """
import resource, sys
from pellucid.data.files import FileNames
def mib(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
names = (f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i:06d}.JPEG" for i in range(10**6))
before = mib("VmRSS")
held = FileNames(".", names)
print(mib("VmRSS") - before, mib("VmHWM") - before, len(held))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory on Linux alone")
def test_a_million_names_take_little_memory():
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    held, peak, n = map(float, answer.stdout.split())
    assert n == 1e6 and held < 60 and peak < 120


# ── scanning ────────────────────────────────────────────────────────────────────────────────────


def test_extensions_are_those_of_images_and_do_not_depend_on_the_host():
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"} <= (
        IMAGE_EXTENSIONS
    )
    assert all(ext == ext.lower() and ext[0] == "." for ext in IMAGE_EXTENSIONS)
    assert ".txt" not in IMAGE_EXTENSIONS and ".mp4" not in IMAGE_EXTENSIONS
    program = (
        "import mimetypes; mimetypes.knownfiles[:] = []\n"
        "from pellucid.data.files import IMAGE_EXTENSIONS; print(*sorted(IMAGE_EXTENSIONS))"
    )
    bare = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert bare.stdout.split() == sorted(IMAGE_EXTENSIONS)


def test_hidden_things_and_other_files_are_left_out_and_case_does_not_count(tmp_path):
    make(tmp_path, ".hid/a.jpg", "A.JPEG", ".b.jpg", "n.txt", "jpg", "jpeg.", "a.jpg.txt")
    assert list(scan(tmp_path)) == ["A.JPEG"]


def test_other_extensions(tmp_path):
    make(tmp_path, "a.jpg", "b.NII.gz", "c.txt", "d", ".e")
    for ending in (".nii.gz", "nii.GZ", ["NII.gz"], {".gz"}):
        assert list(scan(tmp_path, ending)) == ["b.NII.gz"]
    assert list(scan(tmp_path, (".txt", ".jpg"))) == ["a.jpg", "c.txt"]
    assert list(scan(tmp_path, None)) == ["a.jpg", "b.NII.gz", "c.txt", "d"]
    assert list(scan(tmp_path, [])) == []


def test_folders_are_chosen_at_the_top_alone(tmp_path):
    make(tmp_path, "r.jpg", "a/1.jpg", "a/b/2.jpg", "b/3.jpg", "b/a/4.jpg", "c/5.jpg")
    assert list(scan(tmp_path, folders=["a"])) == ["a/1.jpg", "a/b/2.jpg"]
    assert list(scan(tmp_path, folders="a/")) == ["a/1.jpg", "a/b/2.jpg"]
    assert list(scan(tmp_path, folders=["b", "."])) == ["b/3.jpg", "b/a/4.jpg", "r.jpg"]
    assert list(scan(tmp_path, folders=["."])) == ["r.jpg"]
    assert list(scan(tmp_path, folders=[])) == []
    assert list(scan(tmp_path, recurse=False)) == ["r.jpg"]
    assert len(scan(tmp_path)) == 6


def test_a_folder_that_is_not_at_the_top_is_named(tmp_path):
    make(tmp_path, "train/b/1.jpg", "val/2.jpg", "trees.jpg")
    with pytest.raises(DataError, match=r"(?s)no folder 'trian'.*train, val.*mean 'train'"):
        scan(tmp_path, folders=["val", "trian"])
    for missing in ("b", "train/b", "trees.jpg"):
        with pytest.raises(DataError, match=f"no folder '{missing}' directly in"):
            scan(tmp_path, folders=[missing])
    with pytest.raises(SetupError, match="recurse=False enters none"):
        scan(tmp_path, folders=["train"], recurse=False)


def test_files_are_found_in_the_order_of_their_bytes(tmp_path):
    names = ["a.jpg", "a/z.jpg", "a-b/c.jpg", "a b/c.jpg", "a/b/c.png", "B.jpg", "ä.jpg", "0/é.gif"]
    assert list(scan(make(tmp_path, *names))) == sorted(names)


def test_files_are_found_deeper_than_pythons_calls_may_be(tmp_path):
    folders = [tmp_path]
    for _ in range(1200):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    try:
        make(folders[-1], "x.jpg")
        assert list(scan(tmp_path)) == ["d/" * 1200 + "x.jpg"]
    finally:  # pytest could not: its way of removing calls itself
        (folders[-1] / "x.jpg").unlink()
        for folder in folders[:0:-1]:
            folder.rmdir()


@given(
    st.lists(
        st.lists(st.text("ab-./é0", min_size=1, max_size=4), min_size=1, max_size=3), max_size=8
    )
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_scan_gives_what_pathlib_gives_in_order(tmp_path_factory, parts):
    root = tmp_path_factory.mktemp("tree")
    for path in parts:
        folder = root.joinpath(*(part.replace("/", "") or "e" for part in path[:-1]))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{path[-1].replace('/', '')}.jpg").touch()
        except OSError:
            continue  # "..", or a file is there
    found = [p.relative_to(root).as_posix() for p in root.rglob("*.jpg") if p.is_file()]
    expected = [n for n in found if not any(part.startswith(".") for part in n.split("/"))]
    assert list(scan(root)) == sorted(expected, key=os.fsencode)


def test_the_order_in_which_files_were_made_does_not_count(tmp_path):
    names = [f"{folder}/{i}.jpg" for folder in ("b", "a", "c") for i in (3, 1, 2, 10)]
    one, two = make(tmp_path / "one", *names), make(tmp_path / "two", *reversed(names))
    assert list(scan(one)) == list(scan(two)) == sorted(names)


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = make(tmp_path / "root", "a/1.jpg", "a/b/2.jpg")
    make(tmp_path / "other", "3.jpg")
    (root / "a/b/up").symlink_to(root / "a")  # its own ancestor
    (root / "a/b/top").symlink_to(root)
    (root / "a/here").symlink_to(".")
    (root / "sibling").symlink_to("a")
    (root / "outside").symlink_to(tmp_path / "other")
    (root / "link.jpg").symlink_to("a/1.jpg")
    assert list(scan(root)) == [
        "a/1.jpg",
        "a/b/2.jpg",
        "link.jpg",
        "outside/3.jpg",
        "sibling/1.jpg",
        "sibling/b/2.jpg",
    ]
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert list(scan(linked)) == list(scan(root)) and scan(linked).root == str(linked)


def test_a_link_that_leads_nowhere_is_listed_and_what_is_no_file_is_not(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg", "dir.jpg/b.jpg")
    (tmp_path / "broken.jpg").symlink_to("missing.jpg")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "to_pipe.jpg").symlink_to("pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/null")
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 letters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        found = list(scan(tmp_path))
    assert found == ["a.jpg", "broken.jpg", "dir.jpg/b.jpg", "itself.jpg"]


def test_names_of_any_bytes_and_length_survive(tmp_path):
    strange = [b"\xff\xfe.jpg", "日本語".encode() + b".jpg", b"new\nline.jpg", b"x" * 251 + b".jpg"]
    strange += [b" .jpg", b"'\"\\.jpg", b"caf\xe9/\x80.JPG", b"%00.jpg"]
    for name in strange:
        make(tmp_path, os.fsdecode(name))
    names = scan(tmp_path)
    assert [os.fsencode(name) for name in names] == sorted(strange)
    assert all(Path(names.path(i)).is_file() for i in range(len(names)))
    assert pickle.loads(pickle.dumps(names)) == names
    shown(names[[-1]])
    shown(names[[2]])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make(tmp_path, "a/1.jpg", "secret/2.jpg")
    secret, scandir = tmp_path / "secret", os.scandir

    def refuses(folder):
        if os.fsdecode(folder).rstrip("/") == str(secret):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    if os.geteuid() == 0:  # root may read everything
        monkeypatch.setattr(os, "scandir", refuses)
    secret.chmod(0)
    try:
        with pytest.raises(DataError, match=r"(?s)/secret/? cannot be read.*PermissionError"):
            scan(tmp_path)
        assert list(scan(tmp_path, folders=["a"])) == ["a/1.jpg"]
    finally:
        secret.chmod(0o700)


def test_a_folder_that_vanishes_during_the_scan_is_named(tmp_path, monkeypatch):
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def vanishing(folder):
        if b"/a" in folder[-3:]:
            (tmp_path / "b/2.jpg").unlink()
            (tmp_path / "b").rmdir()
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", vanishing)
    with pytest.raises(DataError, match=r"(?s)/b/? cannot be read.*FileNotFoundError"):
        scan(tmp_path)


def test_a_folder_that_is_not_there_or_none_is_told(tmp_path):
    make(tmp_path, "data/a.zip")
    with pytest.raises(DataNotFound) as caught:
        scan(tmp_path / "data" / "trian" / "x")
    assert f"the nearest that exists is {tmp_path}/data\n" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(DataNotFound):
        scan(tmp_path / "data" / "a.zip" / "x")
    with pytest.raises(DataError, match=r"(?s)a\.zip is not a folder.*unpack"):
        scan(tmp_path / "data" / "a.zip")


def test_an_empty_folder_gives_no_files_and_what_needs_some_says_so(tmp_path):
    names = scan(make(tmp_path, "a/notes.txt"))
    assert len(names) == 0 and names == FileNames(tmp_path, [])
    for use in (
        lambda: label_files(names, "folder"),
        lambda: split_by_folder(names),
        lambda: split_at_random(names),
        lambda: split_by_list(names, []),
    ):
        with pytest.raises(DataError) as caught:
            use()
        assert f"There are no files under {tmp_path}." in str(caught.value)
        assert "check the folder" in str(caught.value)
    with pytest.raises(DataError, match="There are no files"):
        label_files([], "folder")


def test_many_tiny_files_are_found_each_once(tmp_path):
    expected = []
    for folder in range(20):
        (tmp_path / f"{folder:02d}").mkdir()
        for i in range(1000):
            name = f"{folder:02d}/{i:04d}.jpg"
            os.close(os.open(f"{tmp_path}/{name}", os.O_CREAT))
            expected.append(name)
    names = scan(tmp_path)
    assert list(names) == expected and len(names) == 20_000


# ── labels ──────────────────────────────────────────────────────────────────────────────────────


def test_the_label_is_the_folder_that_a_file_lies_in():
    assert folder_label("train/n01440764/a.JPEG") == "n01440764"
    assert folder_label("cat/a.jpg") == "cat"
    with pytest.raises(DataError, match=r"The file 'a\.jpg' lies in no folder"):
        folder_label("a.jpg")


def test_the_label_is_the_first_group_of_a_pattern():
    label = pattern_label(r"/([^/]+)_\d+\.jpg$")
    assert label("images/great_pyrenees_173.jpg") == "great_pyrenees"
    assert pickle.loads(pickle.dumps(label))("x/pug_1.jpg") == "pug"
    with pytest.raises(DataError, match=r"(?s)\[\^/\].*'images/cat\.jpg'.*does not match"):
        label("images/cat.jpg")
    for optional in (r"(\d+)?\.jpg", r"(\d*)\.jpg"):
        with pytest.raises(DataError, match="its first group is empty"):
            pattern_label(optional)("cat.jpg")


def test_a_pattern_that_can_give_no_label_is_refused():
    with pytest.raises(SetupError, match=r"(?s)has no group.*round brackets"):
        pattern_label(r"\d+")
    with pytest.raises(SetupError, match=r"(?s)no regular expression.*unterminated"):
        pattern_label("(cat")


def table(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_table_gives_labels_by_name_or_number_of_its_columns(tmp_path):
    path = table(tmp_path, 'id,file,breed\r\n1,a.jpg, cat \r\n\r\n2,"b, c.jpg","dog, big"\r\n')
    expected = {"a.jpg": "cat", "b, c.jpg": "dog, big"}
    assert read_labels(path, "file", "breed") == read_labels(path, 1, 2) == expected
    assert read_labels(str(path), "file", 0) == {"a.jpg": "1", "b, c.jpg": "2"}


@pytest.mark.parametrize("text", ["file,label\na,ü\na,ü\n", "\ufefffile,label\r\na,ü"])
def test_a_table_may_begin_with_a_mark_and_repeat_itself(tmp_path, text):
    assert read_labels(table(tmp_path, text), "file", "label") == {"a": "ü"}


def test_names_in_a_table_may_be_any_bytes(tmp_path):
    make(tmp_path, os.fsdecode(b"\xff.jpg"))
    labels = read_labels(table(tmp_path, b"file,label\n\xff.jpg,cat\n"))
    assert label_files(scan(tmp_path), labels) == ["cat"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,cat\nb,\n", "Line 3 of .* has an empty label"),
        ("file,label\n,cat\n", "Line 2 of .* has an empty file name"),
        ("file,label\na,  \n", "Line 2 of .* has an empty label"),
        ("file,label\na,cat\nb\n", r"(?s)Line 3 of .* wrong number of columns.*saw: 1; .* names 2"),
        ("file,label\na,cat, big\n", r"(?s)Line 2 of .* wrong number of columns.*saw: 3; "),
        (
            "file,label\na,cat\n\nb,dog\na,dog\n",
            "(?s)Line 5 .*'a' anew.*'dog', but 'cat' in line 2",
        ),
        ('file,label\na,"cat\nb,dog\n', "Line 3 of .* is broken"),
        (b"file,label\na,caf\xe9\n", r"(?s)Line 2 of .* is not in UTF-8.*caf\\udce9"),
        ("", r"(?s)has no column 0.*none: it is empty"),
        ("file\na\n", r"(?s)has no column 1.*'file'.*separated by commas"),
        ("file;label\na;cat\n", r"(?s)has no column 1.*'file;label'.*separated by commas"),
        ("file,label\na,cat\n".encode("utf-16"), r"Line|has no column"),
    ],
)
def test_a_slip_in_a_table_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read_labels(table(tmp_path, text))
    shown(caught.value)


@pytest.mark.parametrize("column", ["labels", 2, -1])
def test_a_column_that_is_missing_is_named(tmp_path, column):
    with pytest.raises(DataError, match=f"has no column {column!r}") as caught:
        read_labels(table(tmp_path, "file,label\na,cat\n"), 0, column)
    assert "its first line names 'file', 'label'" in str(caught.value)
    assert column != "labels" or "did you mean 'label'?" in str(caught.value)


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataNotFound, match=r"There is no file '.*nothing\.csv'"):
        read_labels(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path)


NAMES = ["train/cat/1_x.jpg", "train/dog/2_y.jpg", "valid/cat/3_x.jpg"]


def test_files_are_labelled_in_four_ways(tmp_path):
    names = FileNames(tmp_path, NAMES)
    by_table = dict(zip(NAMES, "abc", strict=True))
    for some in (NAMES, names):
        assert label_files(some, "folder") == ["cat", "dog", "cat"]
        assert label_files(some, re.compile(r"_(.)\.jpg")) == ["x", "y", "x"]
        assert label_files(some, lambda name: name[-7]) == ["1", "2", "3"]
        assert label_files(some, by_table) == ["a", "b", "c"]
    assert label_files(names[[2]], by_table) == ["c"]
    first, _, third = label_files(names, "folder")
    assert first is third  # a million labels are as many objects as there are classes


def test_a_file_without_a_label_is_named():
    with pytest.raises(DataError, match=r"'b\.jpg' lies in no folder"):
        label_files(["a/a.jpg", "b.jpg"], "folder")
    with pytest.raises(DataError, match=r"finds no label in the file name 'b\.jpg'"):
        label_files(["a1.jpg", "b.jpg"], re.compile(r"(\d)"))
    with pytest.raises(DataError) as caught:
        label_files([*NAMES, "x.jpg"], {NAMES[0]: "cat", "2_y.jpg": "dog"})
    assert "The table has no label for the file 'train/dog/2_y.jpg'" in str(caught.value)
    assert "3 of 4 files without a label, 2 labels" in str(caught.value)
    with pytest.raises(DataError, match="3 of 3 files without a label, 0 labels"):
        label_files(NAMES, {})


@pytest.mark.parametrize("found", [None, 3, "", b"cat"])
def test_a_label_that_is_no_text_is_refused_with_the_file(found):
    with pytest.raises(DataError, match=r"(?s)file 'train/cat/1_x.jpg' must be a text.*saw: ") as e:
        label_files(NAMES, lambda name: found)
    assert ("str(label)" in str(e.value)) == (found in (3, b"cat"))


def test_a_way_to_label_that_nobody_knows_is_refused():
    with pytest.raises(UnknownName, match=r"(?s)labelled by 'folders'.*re\.compile"):
        label_files(NAMES, "folders")


def test_an_error_in_ones_own_function_stays_and_names_the_file():
    with pytest.raises(ZeroDivisionError) as caught:
        label_files(NAMES, lambda name: str(1 / ("dog" not in name)))
    assert caught.value.__notes__ == [f"pellucid: while labelling the file {NAMES[1]!r}"]


# ── splits ──────────────────────────────────────────────────────────────────────────────────────

PINNED = [1, 4, 5, 7, 17]


def both(split):
    assert all(part.dtype == np.int64 for part in split)
    return tuple(part.tolist() for part in split)


def test_files_are_split_by_their_top_folder_and_others_dropped():
    names = ["train/a/1.jpg", "valid/a/2.jpg", "train/b/3.jpg", "r.jpg", "extra/train/4.jpg"]
    assert both(split_by_folder(names)) == ([0, 2], [1])
    assert both(split_by_folder(names, valid="extra")) == ([0, 2], [4])
    assert both(split_by_folder([*names, "val/5.jpg"])) == ([0, 2], [1])
    assert both(split_by_folder(names, "extra", ["test", "train"])) == ([4], [0, 2])
    assert both(split_by_folder(FileNames("/data", names))) == ([0, 2], [1])


def test_a_split_without_its_folder_is_an_error_that_names_those_there_are():
    names = ["train/1.jpg", "train/2.jpg", "Valid/3.jpg", "r.jpg"]
    with pytest.raises(DataError) as caught:
        split_by_folder(names)
    assert str(caught.value).splitlines() == [
        "There are no validation files in 'valid' or 'val' or 'validation' or 'test'.",
        "  saw: top folders: . (1 files), Valid (1 files), train (2 files)",
        "  do:  name the folder, valid=...; or split at random.",
    ]
    with pytest.raises(DataError, match="There are no training files in 'training'"):
        split_by_folder(names, "training")
    with pytest.raises(SetupError, match="'train' cannot be both"):
        split_by_folder(names, valid=["valid", "train"])


def test_a_random_split_is_always_the_same_and_another_with_another_seed():
    names = [f"{i}.jpg" for i in range(20)]
    expected = [i for i in range(20) if i in split_at_random(names, 0.3, seed=5)[1]]
    train, valid = both(split_at_random(FileNames("/", names), 0.3, seed=5))
    assert valid == expected and sorted(train + valid) == list(range(20))
    parts = {str(both(split_at_random(names, 0.3, seed))) for seed in range(1, 9)}
    assert len(parts) > 6
    assert both(split_at_random(names, seed=-1)) == both(split_at_random(names, seed=2**64 - 1))
    # written down, so that no later version moves a file of a run that is continued
    assert both(split_at_random(names))[1] == PINNED


@given(
    st.sets(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)),
    st.data(),
    st.integers(-(2**70), 2**70),
)
@settings(deadline=None, max_examples=100)
def test_files_that_come_or_go_never_move_another(some, data, seed):
    anchors = [f"anchor/{i}" for i in range(200)]  # so that no part is empty
    before = data.draw(st.permutations([*some, "x"])) + anchors
    after = data.draw(st.permutations(data.draw(st.lists(st.sampled_from(before))))) + anchors

    def chosen(names):
        return {names[i] for i in split_at_random(names, 0.4, seed)[1]}

    assert chosen(after) == chosen(before) & set(after)


def test_the_fraction_is_met_roughly_and_a_larger_one_only_adds():
    names = [f"train/n{i % 10}/{i}.JPEG" for i in range(10_000)]
    parts = [set(split_at_random(names, f, seed=1)[1].tolist()) for f in (0.1, 0.2, 0.5, 0.9)]
    assert [len(part) / 10_000 for part in parts] == pytest.approx([0.1, 0.2, 0.5, 0.9], abs=0.015)
    assert parts[0] < parts[1] < parts[2] < parts[3]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 20, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(SetupError, match="fraction="):
        split_at_random(["a", "b"], fraction)


def test_a_part_without_files_is_refused_with_counts():
    names = [f"{i}.jpg" for i in range(5)]
    with pytest.raises(DataError, match=r"(?s)left for validation.*5 files to train on, 0 to val"):
        split_at_random(names, 1e-9)
    with pytest.raises(DataError, match=r"(?s)left for training.*0 files to train on, 5 to val"):
        split_at_random(names, 1 - 1e-9)
    with pytest.raises(DataError, match=r"(?s)left for validation.*list some"):
        split_by_list(names, [])
    with pytest.raises(DataError, match="left for training"):
        split_by_list(names, names)


def test_a_file_that_is_listed_twice_is_never_in_both_parts():
    names = [f"{i % 50}.jpg" for i in range(100)]
    for train, valid in (split_at_random(names, 0.5), split_by_list(names, ["3.jpg", "3.jpg"])):
        assert not {names[i] for i in train} & {names[i] for i in valid}
        assert len(train) + len(valid) == 100


def test_files_are_split_by_a_list_or_a_text_file(tmp_path):
    names = ["a/1.jpg", "a/2.jpg", "b/ü.jpg", os.fsdecode(b"b/\xff.jpg"), "b/ 3 .jpg"]
    path = tmp_path / "valid.txt"
    path.write_bytes(b"\xef\xbb\xbfa/2.jpg\r\n\n" + "b/ü.jpg\nb/ 3 .jpg\n".encode() + b"b/\xff.jpg")
    expected = ([0], [1, 2, 3, 4])
    assert both(split_by_list(names, path)) == both(split_by_list(names, str(path))) == expected
    assert both(split_by_list(names, reversed(names[1:]))) == expected
    assert both(split_by_list(names, FileNames("/data", names[1:]))) == expected


def test_a_listed_name_that_is_no_file_is_told_with_the_nearest(tmp_path):
    names = FileNames(tmp_path, [f"images/great_{i}.jpg" for i in range(300)])
    for wrong, near in (
        ("great_17.jpg", "images/great_17.jpg"),
        ("./images/great_17.jpg", "images/great_17.jpg"),
        ("images/great_299.jpeg", "images/great_299.jpg"),
    ):
        with pytest.raises(DataError) as caught:
            split_by_list(names, ["images/great_1.jpg", wrong, "zzz"])
        assert f"The file {wrong!r} of the list" in str(caught.value)
        assert "2 such of 3 listed; 300 files" in str(caught.value)
        assert f"did you mean {near!r}?" in str(caught.value)
    with pytest.raises(DataError) as caught:
        split_by_list(names, ["zzz"])
    assert len(str(caught.value)) < 200  # and not 300 names
    with pytest.raises(DataNotFound, match="There is no file"):
        split_by_list(names, tmp_path / "nothing.txt")


# ── classes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ("dog cat dog", ["cat", "dog"]),
        ("10 2 1 2", ["1", "2", "10"]),
        ("10 2 -1 07", ["-1", "2", "07", "10"]),
        ("10 2 x", ["10", "2", "x"]),
        ("² 1", ["1", "²"]),
        ("1 01 001", ["001", "01", "1"]),
        ("one", ["one"]),
    ],
)
def test_classes_are_the_labels_in_order(labels, classes):
    assert vocabulary(labels.split()) == vocabulary(reversed(labels.split())) == classes


def test_no_labels_make_no_classes():
    with pytest.raises(DataError, match="There are no labels"):
        vocabulary([])


def test_labels_become_numbers_also_of_one_class_or_one_file():
    encoded = encode(["b", "a", "b"], ["a", "b", "c"], NAMES)
    assert encoded.tolist() == [1, 0, 1] and encoded.dtype == np.int64
    assert encode(["a"], ["a"], NAMES[:1]).tolist() == [0]
    assert encode([], ["a"], []).shape == (0,)
    one = vocabulary(["a", "b", "b", "b"])  # a class of one file
    assert np.bincount(encode(["a", "b", "b", "b"], one, "wxyz")).tolist() == [1, 3]


def test_a_class_that_only_validation_knows_is_named(tmp_path):
    make(tmp_path, *(f"{p}/{c}/{i}.jpg" for p, c in (("train", "cat"), ("train", "dog"),
         ("val", "cat"), ("val", "dgo"), ("val", "emu")) for i in range(2)))  # fmt: skip
    names = scan(tmp_path)
    labels = np.array(label_files(names, "folder"))
    train, valid = split_by_folder(names)
    classes = vocabulary(labels[train].tolist())
    assert encode(labels[train].tolist(), classes, names[train]).tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError) as caught:
        encode(labels[valid].tolist(), classes, names[valid])
    assert str(caught.value).splitlines() == [
        "The label 'dgo' of the file 'val/dgo/0.jpg' is no class.",
        "  saw: 4 of 6 files with such labels, 1 other labels among them; 2 classes: cat, dog",
        "  do:  did you mean 'dog'? Classes come from the training files: add some of this one.",
    ]


def test_a_class_that_only_training_knows_is_fine():
    assert encode(["a"], vocabulary(["a", "b"]), ["x"]).tolist() == [0]


def test_of_many_classes_a_message_lists_few():
    with pytest.raises(DataError) as caught:
        encode(["zebra"], [f"n{i:08d}" for i in range(1000)], ["a.jpg"])
    assert "1000" not in str(caught.value) and "and 990 more" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_labels_and_classes_that_cannot_be_right_are_refused():
    with pytest.raises(DataError, match="3 files, 2 labels"):
        encode(["a", "a"], ["a"], NAMES)
    with pytest.raises(SetupError, match="'a' is there twice"):
        encode(["a"], ["a", "b", "a"], NAMES[:1])
