"""The command line as a user meets it: help, slips, exit codes, and the main job."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pellucid import cli
from pellucid.errors import DataNotFound


def run(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pellucid", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def exit_code(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pellucid", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_help_and_slips_answer_without_torch():
    code = (
        "import sys; sys.argv = ['pellucid', '--help']\n"
        "from pellucid.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Begin with: pellucid train digits" in done.stdout


def test_the_main_job_trains_digits_and_names_what_it_saved(tmp_path):
    done = run("train", "digits", "--seed", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s+\d+  ", line)]
    assert float(rows[-1][4]) >= 0.98  # valid accuracy
    saved = tmp_path / "runs" / "digits"
    assert (saved / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert f"picture of the run: {Path('runs/digits/training.png')}" in done.stdout
    assert len(json.loads((saved / "record.json").read_text())["epochs"]["seconds"]) == len(rows)
    assert (saved / "model.safetensors").stat().st_size > 1000


def test_find_lr_suggests_a_rate_and_saves_the_curve(tmp_path, monkeypatch, capsys):
    assert exit_code(monkeypatch, "find-lr", "digits", "--out", str(tmp_path)) == 0
    assert re.search(r"suggested: --lr [\d.e-]+", capsys.readouterr().out)
    assert (tmp_path / "lr.png").exists()


def test_show_says_what_the_data_hold_and_saves_a_picture(tmp_path, monkeypatch, capsys):
    assert exit_code(monkeypatch, "show", "digits", "--out", str(tmp_path)) == 0
    assert "digits: 1,438 images to train on, 359 to validate" in capsys.readouterr().out
    assert (tmp_path / "batch.png").exists()


def test_of_a_broken_file_it_says_what_to_write_on_the_command_line(tmp_path, monkeypatch, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.effect_noise((8, 8), 60 + i).convert("RGB")
            image.save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"no image")
    words = ("train", str(tmp_path / "images"), "--epochs", "1", "--out", str(tmp_path / "run"))
    assert exit_code(monkeypatch, *words) == 1
    said = capsys.readouterr().err
    assert "--bad skip leaves them out" in said and 'bad="' not in said
    assert exit_code(monkeypatch, *words, "--bad", "skip") == 0


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trian", "digits"], 'Did you mean "train"?'),
        (["train", "digit"], "did you mean 'digits'?"),
        (["train", "digits", "--epoch", "3"], "Did you mean --epochs?"),
        (["train", "digits", "--model", "simple_ccn"], "did you mean 'simple_cnn'?"),
        (["train", "digits", "--epochs", "many"], "--epochs"),
        (["train", "digits", "--epochs", "0"], "Must be >= 1"),
        (["train", "digits", "--batch-size", "0"], "batch_size=0"),
        (["train", "digits", "--device", "tpu"], "The device 'tpu' cannot be used."),
        (["train"], "SOURCE"),
    ],
)
def test_a_slip_is_answered_with_the_right_word_and_exit_code_2(words, answer, monkeypatch, capsys):
    assert exit_code(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert answer in said.out + said.err
    assert "Traceback" not in said.err


def test_data_that_are_nowhere_end_with_exit_code_1(monkeypatch, capsys, tmp_path):
    def offline(name: str, *_: object, **__: object) -> None:
        raise DataNotFound(f"{name} could not be downloaded.", saw="no network")

    monkeypatch.setattr("pellucid.data.named.fetch_dataset", offline)
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path))
    monkeypatch.delenv("PELLUCID_DATA", raising=False)
    assert exit_code(monkeypatch, "train", "mnist") == 1
    assert "mnist is not on this machine." in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_reached_and_ends_with_130(tmp_path):
    command = [sys.executable, "-u", "-m", "pellucid", "train", "digits", "--epochs", "10000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        for line in process.stdout:
            if line.split()[:1] == ["3"]:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
    assert "picture of the run" in rest
