"""What tells functions and values apart, in this process and in any other."""

import subprocess
import sys
from functools import partial, wraps
from pathlib import Path

from pellucid.ablation.fingerprint import fingerprint, in_words


def made(code: str):
    space: dict[str, object] = {}
    exec(code, space)
    return space["f"]


PLAIN = "def f(a, b=1):\n    return a in {'x', 'y', 'z'} and b"


def test_comments_blanks_and_docstrings_are_not_code():
    same = 'def f(a, b=1):\n    """Say."""\n\n    # so\n    return a in {"x", "y", "z"} and (b)'
    assert fingerprint(made(PLAIN)) == fingerprint(made(same))
    assert len(fingerprint(made(PLAIN))) == 12


def test_every_change_of_the_code_shows():
    variants = [
        PLAIN,
        PLAIN.replace("b=1", "b=2"),
        PLAIN.replace("b=1", "*, b=1"),
        PLAIN.replace("'z'", "'w'"),
        PLAIN.replace("and", "or"),
        PLAIN.replace("a in", "len(a) in"),
        "def f(a, b=1):\n    return [c for c in a if c > 1]",
        "def f(a, b=1):\n    return [c for c in a if c > 2]",
        "f = lambda a, b=1: a",
    ]
    assert len({fingerprint(made(code)) for code in variants}) == len(variants)


def test_a_fingerprint_is_the_same_in_another_process():
    words = {"x", "y", "z"}
    code = f"""if True:
        import sys
        sys.path.append({str(Path(fingerprint.__code__.co_filename).parent)!r})
        from fingerprint import fingerprint, in_words  # without torch: soon begun
        exec({PLAIN!r})
        print(fingerprint(f), in_words({words!r}))"""
    for hashes in ("1", "2"):  # the order of sets of words differs
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True,
            env={"PYTHONHASHSEED": hashes},
        )  # fmt: skip
        told = f"{fingerprint(made(PLAIN))} {in_words(words)}\n"
        assert answer.stdout == told, answer.stderr


def test_settings_that_a_function_has_from_around_it_count():
    def around(setting, log, n_calls=0):
        def f(x):
            nonlocal n_calls
            n_calls += 1
            log.append(x)
            return setting, late

        if log:
            late = 1
        return f

    assert fingerprint(around(1, [])) == fingerprint(around(1, [], 3))
    assert len({fingerprint(around(setting, [])) for setting in (1, 1.0, "1", True)}) == 4
    assert fingerprint(around(1, [2])) != fingerprint(around(1, []))  # late is there


class Callable:
    def __init__(self, n):
        self.n = n

    def __call__(self, seed):
        return seed + self.n


def test_partials_methods_wrapped_functions_and_objects_have_that_of_their_code():
    f = made(PLAIN)

    @wraps(f)
    def wrapped(*args):
        return f(*args)

    assert fingerprint(partial(f, 1)) == fingerprint(wrapped) == fingerprint(f)
    assert fingerprint(Callable(1)) == fingerprint(Callable.__call__) != ""
    assert fingerprint(print) == ""


def test_values_are_told_apart_without_their_addresses():
    f, g = made(PLAIN), made(PLAIN.replace("b=1", "b=2"))
    assert in_words(f, code=False) == "f"
    assert in_words(f) != in_words(g)
    assert in_words(f) == in_words(made(PLAIN))
    assert in_words(partial(f, 3, b=4), code=False) == "partial(f, 3, b=4)"
    assert in_words(int) == "int"
    assert in_words(("a", 0.1)) == "('a', 0.1)"
    assert in_words(Callable(1)) == in_words(Callable(2))
    assert " at 0x" not in in_words(Callable(1))
