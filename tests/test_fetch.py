"""Downloads from this machine to itself: what a server, a disk or a kill can do to them."""

import hashlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pellucid.data.fetch import cache_folder, fetch, fetch_dataset, remove_dataset
from pellucid.data.sources import IDX_FILES, SOURCES, Source
from pellucid.errors import DataError, DataNotFound, SetupError, UnknownName

# the module: pellucid.data may have a function of its name
fetching = importlib.import_module("pellucid.data.fetch")

CONTENT = bytes(range(256)) * 200
SHA256 = hashlib.sha256(CONTENT).hexdigest()

TREE = {f"{kind}/{i}.txt": f"{kind} {i}".encode() * 50 for kind in ("cat", "dog") for i in range(6)}


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for name, content in files.items():
            head = tarfile.TarInfo(f"pets/{name}")
            head.size = len(content)
            file.addfile(head, io.BytesIO(content))
    return out.getvalue()


ARCHIVE = packed(TREE)
ARCHIVE_SHA256 = hashlib.sha256(ARCHIVE).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# ── a server that does what it is told ──────────────────────────────────────────────────────────

Answer = Callable[[BaseHTTPRequestHandler], None]


def give(
    content: bytes, status: int = 200, claim: int | None = None, close: bool = False
) -> Answer:
    """Make an answer: a status, a content, and the length that is claimed for it."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if claim is None else claim))
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = close or claim is not None

    return answer


def redirect(to: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


class Server(ThreadingHTTPServer):
    """Gives its answers one after the other, the last one for ever."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        self.answers: list[Answer] = [give(CONTENT)]
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # who asked has been killed


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answers = self.server.answers
        answers[min(len(self.server.asked), len(answers)) - 1](self)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache, no proxy, no pauses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetching, "_PAUSE", 0)
    return tmp_path / "home"


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def fails(server: Server, home: Path, url: str = "", **how: int) -> str:
    """Fetch what cannot be; return what was said. Nothing may be left."""
    with pytest.raises(DataNotFound, match="could not be downloaded") as caught:
        fetch(url or f"{server.url}/x.bin", SHA256, **how)
    assert visible(home / "archives") == []
    text = str(caught.value)
    assert f"put it at {home / 'archives'}" in text and SHA256 in text
    return text


def recovers(server: Server, home: Path) -> None:
    server.answers = [give(CONTENT)]
    assert fetch(f"{server.url}/x.bin", SHA256).read_bytes() == CONTENT
    assert visible(home / "archives") == ["x.bin"]


# ── one file ────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_fetched_once_and_silently(server, tmp_path, capfd):
    folder = tmp_path / "new" / "folder"
    for sha256 in (SHA256, SHA256.upper()):
        found = fetch(f"{server.url}/a/x.bin?version=1#top", sha256, folder)
        assert found == folder / "x.bin" and found.read_bytes() == CONTENT
    assert server.asked == ["/a/x.bin?version=1"]
    assert visible(folder) == ["x.bin"]
    assert capfd.readouterr() == ("", "")


def test_a_file_may_get_another_name_and_place(server, home):
    assert fetch(f"{server.url}/x", SHA256, name="y.bin") == home / "archives" / "y.bin"


def test_force_makes_exactly_one_download(server, home):
    for _ in range(2):
        fetch(f"{server.url}/x.bin", SHA256, force=True)
    assert len(server.asked) == 2


@pytest.mark.parametrize("there", [b"", CONTENT[:-1], CONTENT[:100] + b"?" + CONTENT[101:]])
def test_a_file_with_another_checksum_is_fetched_again_and_that_is_said(server, home, there, capfd):
    path = home / "archives" / "x.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(there)
    recovers(server, home)
    assert capfd.readouterr().err.startswith(f"{path} has another checksum than it should")


def test_what_is_there_stays_when_its_replacement_fails(server, home):
    recovers(server, home)
    server.answers = [give(b"", 404)]
    with pytest.raises(DataNotFound):
        fetch(f"{server.url}/x.bin", SHA256, force=True)
    assert (home / "archives" / "x.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("twelfth", range(12))
def test_a_cut_transfer_is_tried_three_times(server, home, twelfth):
    server.answers = [give(CONTENT[: len(CONTENT) * twelfth // 12], claim=len(CONTENT))]
    assert "the transfer was cut (tried 3 times)" in fails(server, home)
    assert len(server.asked) == 3
    recovers(server, home)


def test_a_cut_transfer_may_be_whole_the_next_time(server, home):
    server.answers = [give(CONTENT[:9], claim=len(CONTENT)), give(CONTENT[:-1]), give(CONTENT)]
    assert fetch(f"{server.url}/x.bin", SHA256).read_bytes() == CONTENT
    assert len(server.asked) == 3


@pytest.mark.parametrize("claim", [0, 100, len(CONTENT) - 1])
def test_a_length_that_is_too_small_is_a_wrong_content(server, home, claim):
    server.answers = [give(CONTENT, claim=claim)]
    assert f"what came, {claim:,} bytes, has another checksum" in fails(server, home)
    recovers(server, home)


WRONG = {
    "another content": (give(CONTENT[::-1]), "has another checksum (tried 3 times)", 3),
    "a web page": (give(b"<!DOCTYPE html><p>Log in"), "a web page (HTML) came instead", 3),
    "another content each time": (lambda h: give(os.urandom(900))(h), "has another checksum", 3),
    "not there": (give(b"no", 404), "the server answers 404 Not Found\n", 1),
    "forbidden": (give(b"no", 403), "the server answers 403 Forbidden\n", 1),
    "too many requests": (give(b"no", 429), "answers 429 Too Many Requests (tried 3 times)", 3),
    "server error": (give(b"no", 500), "answers 500 Internal Server Error (tried 3 times)", 3),
    "unavailable": (give(b"no", 503), "503 Service Unavailable (tried 3 times)", 3),
    "to a file": (redirect("file:///etc/passwd"), "redirects to what is no address", 1),
    "to a program": (redirect("javascript:alert(1)"), "redirects to what is no address", 1),
    "redirect loop": (redirect("/x.bin"), "redirects without end\n", 31),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_told_and_leaves_nothing(server, home, case):
    answer, reason, n_requests = WRONG[case]
    server.answers = [answer]
    assert reason in fails(server, home)
    assert len(server.asked) == n_requests
    recovers(server, home)


def test_a_redirect_is_followed(server, home):
    server.answers = [redirect("/elsewhere/z"), give(CONTENT)]
    assert fetch(f"{server.url}/x.bin", SHA256).name == "x.bin"
    assert server.asked == ["/x.bin", "/elsewhere/z"]


def test_a_server_that_changes_its_mind_between_tries(server, home):
    server.answers = [give(b"no", 500), give(b"old"), give(CONTENT)]
    assert fetch(f"{server.url}/x.bin", SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("sent", [0, 1000])
def test_a_server_that_falls_silent_is_given_up(server, home, sent, monkeypatch):
    released = threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        handler.wfile.write(CONTENT[:sent])
        released.wait(20)

    server.answers = [stall]
    monkeypatch.setattr(fetching, "_READ", 0.05)
    assert "sent nothing for 0.05 s (tried 3 times)" in fails(server, home)
    released.set()
    monkeypatch.undo()


def test_more_bytes_than_allowed_are_not_taken(server, home):
    taken = fetch(f"{server.url}/x.bin", SHA256, max_bytes=len(CONTENT), force=True)
    taken.unlink()
    assert f"more came than the {len(CONTENT) - 1:,}" in fails(
        server, home, max_bytes=len(CONTENT) - 1
    )
    assert len(server.asked) == 2


def test_a_machine_without_a_network_is_told_soon(server, home):
    with Server() as gone:
        pass
    assert f"127.0.0.1:{gone.server_port} cannot be reached" in fails(server, home, f"{gone.url}/x")


def test_a_disk_that_is_full_is_told_and_left_clean(server, home, monkeypatch):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataNotFound, match="could not be saved"):
            fetch(f"{server.url}/x.bin", SHA256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert visible(home / "archives") == []
    recovers(server, home)


def test_a_cache_that_cannot_be_written_is_told(server, home):
    home.write_text("a file where the folder should be")
    with pytest.raises(DataNotFound, match="could not be saved") as caught:
        fetch_dataset(f"{server.url}/pets.tgz", ARCHIVE_SHA256)
    assert "PELLUCID_HOME" in str(caught.value)


def test_ctrl_c_leaves_nothing_behind(server, home, monkeypatch):
    def interrupted(path, sha256):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_has_sum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server.url}/x.bin", SHA256, force=True)
    assert visible(home / "archives") == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/x", "x.tgz", "https:///x", "http://host/", "http://h"]
)
def test_what_is_no_address_of_a_file_is_refused(home, url):
    with pytest.raises(SetupError):
        fetch(url, SHA256)


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", ".", "a\0"])
def test_a_name_that_leads_elsewhere_is_refused(home, name):
    with pytest.raises(SetupError, match="no name of a file"):
        fetch("http://127.0.0.1:1/x", SHA256, name=name)
    with pytest.raises(SetupError):
        fetch_dataset(f"http://127.0.0.1:1/{name}.tgz/..", SHA256)


@pytest.mark.parametrize("sha256", ["", "abc", "g" * 64, SHA256[:-1]])
def test_a_checksum_that_is_none_is_refused(home, sha256):
    with pytest.raises(SetupError, match="64 hexadecimal digits"):
        fetch("http://127.0.0.1:1/x", sha256)


# ── a data set ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pets(server) -> str:
    server.answers = [give(ARCHIVE)]
    return f"{server.url}/pets.tgz"


def test_a_data_set_is_fetched_and_unpacked_once(server, home, pets):
    for _ in range(2):
        found = fetch_dataset(pets, ARCHIVE_SHA256)
        assert found == home / "data" / "pets" and tree(found) == TREE
    assert server.asked == ["/pets.tgz"]
    assert visible(home / "archives") == ["pets.tgz"]
    assert visible(home / "data") == [".pets.sha256", "pets"]


def test_force_makes_one_download_and_a_fresh_folder(server, home, pets):
    (fetch_dataset(pets, ARCHIVE_SHA256) / "cat" / "0.txt").write_text("spoilt")
    assert tree(fetch_dataset(pets, ARCHIVE_SHA256, force=True)) == TREE
    assert len(server.asked) == 2
    assert visible(home / "data") == [".pets.sha256", "pets"]


@pytest.mark.parametrize("ending", ["tgz", "tar.gz", "TAR.BZ2", "tar", "zip", "txz"])
def test_the_folder_has_the_name_of_the_archive(server, home, ending):
    server.answers = [give(ARCHIVE)]
    assert fetch_dataset(f"{server.url}/p.e.{ending}", ARCHIVE_SHA256).name == "p.e"


def test_an_archive_that_is_there_is_unpacked_without_asking(server, home, pets):
    fetch_dataset(pets, ARCHIVE_SHA256)
    remove_dataset(pets, archive=False)
    assert visible(home / "data") == [] and visible(home / "archives") == ["pets.tgz"]
    assert tree(fetch_dataset(pets, ARCHIVE_SHA256)) == TREE
    assert len(server.asked) == 1


def test_an_archive_that_is_spoilt_is_fetched_again(server, home, pets, capfd):
    fetch_dataset(pets, ARCHIVE_SHA256)
    remove_dataset(pets, archive=False)
    (home / "archives" / "pets.tgz").write_bytes(ARCHIVE[:-1])
    assert tree(fetch_dataset(pets, ARCHIVE_SHA256)) == TREE
    assert "fetching it again" in capfd.readouterr().err


def test_each_part_is_removed_alone(server, home, pets):
    remove_dataset(pets)  # nothing is there yet
    fetch_dataset(pets, ARCHIVE_SHA256)
    remove_dataset(pets, data=False)
    assert visible(home / "archives") == [] and tree(home / "data" / "pets") == TREE
    remove_dataset(pets)
    assert visible(home / "data") == []


def test_the_content_of_another_archive_is_not_taken_for_this_one(server, home, pets):
    fetch_dataset(pets, ARCHIVE_SHA256)
    other = packed({"a": b"1"})
    server.answers = [give(other)]
    sha256 = hashlib.sha256(other).hexdigest()
    with pytest.raises(DataError, match="content of another archive"):
        fetch_dataset(pets, sha256)
    assert tree(fetch_dataset(pets, sha256, force=True)) == {"a": b"1"}


def test_an_archive_that_is_refused_leaves_the_old_folder(server, home, pets):
    fetch_dataset(pets, ARCHIVE_SHA256)
    evil = packed({"../../evil": b"1"})
    server.answers = [give(evil)]
    with pytest.raises(DataError, match="is refused"):
        fetch_dataset(pets, hashlib.sha256(evil).hexdigest(), force=True)
    assert tree(home / "data" / "pets") == TREE
    assert visible(home / "data") == [".pets.sha256", "pets"]


def test_a_folder_put_there_by_hand_is_taken(server, home, pets):
    (home / "data" / "pets").mkdir(parents=True)
    assert fetch_dataset(pets, ARCHIVE_SHA256) == home / "data" / "pets"
    assert server.asked == []


def test_an_address_without_a_checksum_is_not_trusted(server, home, pets):
    with pytest.raises(SetupError, match="not known") as caught:
        fetch_dataset(pets)
    assert "sha256sum FILE" in str(caught.value) and server.asked == []


def test_a_name_that_nobody_knows(home):
    with pytest.raises(UnknownName, match="did you mean 'imagenette2-160'"):
        fetch_dataset("imagenette-160")


# ── the registry ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SOURCES)
def test_each_named_data_set_is_told_completely(name):
    for source in SOURCES[name]:
        assert source.url.startswith("https://") and source.licence and source.origin
        assert source.sha256 is None or fetching._checked(source.url, source.sha256)
        assert source.size is None or source.size > 1000
    urls = [source.url for source in SOURCES[name]]
    assert len(set(urls)) == len(urls) in (1, 4)
    assert [url.rsplit("/", 1)[1] for url in urls] == [f"{f}.gz" for f in IDX_FILES] or len(
        urls
    ) == 1


def test_a_named_archive_goes_by_its_name_and_its_size_is_a_limit(server, home, monkeypatch):
    source = Source(f"{server.url}/x-1.tar.gz", ARCHIVE_SHA256, len(ARCHIVE))
    monkeypatch.setitem(SOURCES, "x", (source,))
    server.answers = [give(ARCHIVE)]
    assert fetch_dataset("x") == fetch_dataset(source.url) == home / "data" / "x"
    assert visible(home / "archives") == ["x-1.tar.gz"]
    monkeypatch.setitem(SOURCES, "x", (replace(source, size=100),))
    with pytest.raises(DataNotFound, match="more came than the 100 bytes"):
        fetch_dataset("x", force=True)
    remove_dataset("x")
    assert visible(home / "data") == visible(home / "archives") == []


def test_a_named_archive_whose_checksum_nobody_knows_asks_for_one(server, home, monkeypatch):
    monkeypatch.setitem(SOURCES, "x", (Source(f"{server.url}/x.tgz", None, None),))
    server.answers = [give(ARCHIVE)]
    with pytest.raises(SetupError, match="not known"):
        fetch_dataset("x")
    assert tree(fetch_dataset("x", ARCHIVE_SHA256)) == TREE


def test_a_data_set_of_several_files_appears_when_all_are_there(server, home, monkeypatch):
    files = [Source(f"{server.url}/{name}.gz", SHA256, None) for name in IDX_FILES]
    monkeypatch.setitem(SOURCES, "x", tuple(files))
    server.answers = [give(CONTENT)] * 3 + [give(b"", 404), give(CONTENT)]
    with pytest.raises(DataNotFound):
        fetch_dataset("x")
    assert visible(home / "data") == []
    assert tree(fetch_dataset("x")) == {f"{name}.gz": CONTENT for name in IDX_FILES}
    assert len(server.asked) == 8
    with pytest.raises(SetupError, match="each with its own checksum"):
        fetch_dataset("x", SHA256)
    remove_dataset("x")
    assert visible(home / "data") == []


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "home"
    monkeypatch.delenv("PELLUCID_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pellucid"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pellucid"


# ── killed, and two at once ─────────────────────────────────────────────────────────────────────

NURSERY = """
import json, os, signal, sys
import filelock, pooch, requests
from pellucid.data.fetch import fetch_dataset

def child(url, sha256, home, die_at):
    os.environ["PELLUCID_HOME"] = home
    n_events = 0
    def count(event, args):
        nonlocal n_events
        # before anything is done to the disk
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            n_events += 1
            if n_events == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    fetch_dataset(url, sha256)
    print(n_events, file=sys.stderr, flush=True)

for line in sys.stdin:
    word, *args = json.loads(line)
    if word == "start":
        pid = os.fork()
        if not pid:
            try:
                child(*args)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(args[0], 0)[1]), flush=True)
"""


class Nursery:
    """A process that has imported everything, and whose children can be killed cheaply."""

    def __init__(self, process: subprocess.Popen, said: Path):
        self.process, self.said = process, said

    def _ask(self, *words: object) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, url: str, home: Path, die_at: int = 0) -> int:
        """Fetch the data set in a new process that may kill itself at an event; return its id."""
        return self._ask("start", url, ARCHIVE_SHA256, str(home), die_at)

    def wait(self, pid: int) -> int:
        return self._ask("wait", pid)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    said = tmp_path_factory.mktemp("nursery") / "said"
    package = str(Path(fetching.__file__).parents[2])
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "PYTHONPATH": package, "NO_PROXY": "127.0.0.1"},
        )
        with process:
            yield Nursery(process, said)
            process.stdin.close()


def whole_or_not_there(home: Path) -> None:
    folder = home / "data" / "pets"
    assert not folder.exists() or tree(folder) == TREE
    archive = home / "archives" / "pets.tgz"
    assert not archive.exists() or archive.read_bytes() == ARCHIVE


def comes_right(url: str, home: Path) -> None:
    assert tree(fetch_dataset(url, ARCHIVE_SHA256)) == TREE
    assert visible(home / "data") == [".pets.sha256", "pets"]
    assert visible(home / "archives") == ["pets.tgz"]


@pytest.mark.parametrize("part", range(20))
def test_killed_while_downloading(server, home, pets, nursery, part):
    sent, released = threading.Event(), threading.Event()

    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(ARCHIVE)))
        handler.end_headers()
        handler.wfile.write(ARCHIVE[: len(ARCHIVE) * part // 20])
        sent.set()
        released.wait(20)

    server.answers = [slow, give(ARCHIVE)]
    pid = nursery.start(pets, home)
    assert sent.wait(20)
    os.kill(pid, signal.SIGKILL)
    assert nursery.wait(pid) == -signal.SIGKILL
    released.set()
    assert not (home / "data" / "pets").exists() and not (home / "archives" / "pets.tgz").exists()
    comes_right(pets, home)
    assert len(server.asked) == 2


@pytest.fixture(scope="module")
def n_events(nursery, tmp_path_factory) -> int:
    """Count what a call does to the disk when the archive is there."""
    home = tmp_path_factory.mktemp("counted")
    (home / "archives").mkdir()
    (home / "archives" / "pets.tgz").write_bytes(ARCHIVE)
    pid = nursery.start("http://127.0.0.1:1/pets.tgz", home)
    assert nursery.wait(pid) == 0
    return int(nursery.said.read_text().split()[-1])


@pytest.mark.parametrize("part", range(20))
def test_killed_while_unpacking(home, nursery, n_events, part):
    (home / "archives").mkdir(parents=True)
    (home / "archives" / "pets.tgz").write_bytes(ARCHIVE)
    nowhere = "http://127.0.0.1:1/pets.tgz"
    pid = nursery.start(nowhere, home, die_at=1 + (n_events - 1) * part // 19)
    assert nursery.wait(pid) == -signal.SIGKILL
    whole_or_not_there(home)
    comes_right(nowhere, home)


@pytest.mark.parametrize("part", range(10))
def test_killed_anywhere_between_both(server, home, pets, nursery, n_events, part):
    pid = nursery.start(pets, home, die_at=1 + (n_events + 3) * part // 10)
    assert nursery.wait(pid) == -signal.SIGKILL
    whole_or_not_there(home)
    comes_right(pets, home)


@pytest.mark.parametrize("n_processes", [2, 4])
def test_several_processes_at_once_make_one_download(server, home, pets, nursery, n_processes):
    all_there = threading.Event()

    def patient(handler):
        all_there.wait(20)
        give(ARCHIVE)(handler)

    server.answers = [patient]
    pids = [nursery.start(pets, home) for _ in range(n_processes)]
    all_there.set()
    assert [nursery.wait(pid) for pid in pids] == [0] * n_processes
    assert server.asked == ["/pets.tgz"]
    comes_right(pets, home)


def test_who_waits_for_another_says_so(server, home, pets, capfd):
    asked, released = threading.Event(), threading.Event()

    def patient(handler):
        asked.set()
        released.wait(20)
        give(ARCHIVE)(handler)

    server.answers = [patient]
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_dataset(pets, ARCHIVE_SHA256)))
        for _ in range(2)
    ]
    threads[0].start()
    assert asked.wait(20)
    threads[1].start()
    said = ""
    while "waiting for another process" not in said and threads[1].is_alive():
        said += capfd.readouterr().err
        time.sleep(0.01)
    released.set()
    for thread in threads:
        thread.join()
    assert f"at work on {home / 'data' / 'pets'}" in said
    assert len(server.asked) == 1 and found == [home / "data" / "pets"] * 2
