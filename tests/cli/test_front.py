"""The front door: help, unknown words, completion, the demo, pipes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from narrows.cli.parser import build_parser

INPUT = ("-i", "f32[2,3,8,8]")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(run, shell: str):
    code, script, _ = run("completion", shell)
    assert code == 0
    for word in ("compile", "couplings", "why", "--only", "--allow-pickle", "zsh"):
        assert (word.removeprefix("--") if shell == "fish" else word) in script
    program = shutil.which(shell)
    if program is not None:
        path = subprocess.run([program, "-n"], input=script, text=True, check=False)
        assert path.returncode == 0
    assert json.loads(run("completion", shell, "--json")[1])["script"] == script


def test_bash_completes(run):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    script = run("completion", "bash")[1]

    def complete(*words: str) -> list[str]:
        given = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        line = given + '; _narrows; echo "${COMPREPLY[@]}"'
        done = subprocess.run(
            [bash, "-c", script + line], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert complete("narrows", "co") == [
        "compile", "compress", "compensations", "couplings", "completion",
    ]  # fmt: skip
    assert complete("narrows", "plan", "--c") == [
        "--criterion",
        "--criterion-loss",
        "--costs",
        "--constrained",
    ]
    assert complete("narrows", "completion", "f") == ["fish"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), 2),
        (("--help",), 0),
        (("compile", "--help"), 0),
        (("--version",), 0),
        (("squash",), 2),
        (("compile", "x:y"), 2),
        (("completion", "csh"), 2),
    ],
)
def test_the_front_door(run, words, code):
    assert run(*words)[0] == code


def test_every_command_takes_json_and_has_help():
    (subparsers,) = (a for a in build_parser()._actions if a.dest == "command" or a.choices)
    assert set(subparsers.choices) == {
        "bench", "compile", "demo", "plan", "passes", "ops", "couplings", "why", "show", "diff",
        "check", "completion", "quantize", "quantize-weights", "targets", "criteria",
        "compress", "compensations", "budgets", "allocators", "sense",
    }  # fmt: skip
    for command in subparsers.choices.values():
        assert "--json" in command.format_help()
        assert command.description
        for action in command._actions:
            assert action.help or action.dest == "shell"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("pln", "nets.py:small"), "did you mean 'plan'?"),
        (("plan", "nets.py:small", "--ration", "0.5", "-o", "p"), "did you mean '--ratio'?"),
        (("plan", "nets.py:small", "--ration=0.5", "-o", "p"), "did you mean '--ratio'?"),
        (("plan", "nets.py:small", "--scope", "globl", "-o", "p"), "did you mean 'global'?"),
    ],
)
def test_a_misspelt_word_gets_a_suggestion(run, words, hint: str):
    code, _, err = run(*words)
    assert code == 2
    assert err.rstrip().endswith(hint)


def test_the_demo_gets_the_arguments(run, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("narrows.demo.main", lambda a: seen.append((a.output, a.quick)) or 0)
    assert run("demo", "-o", "here", "--quick")[0] == 0
    assert seen == [("here", True)]


def test_a_closed_pipe_is_no_failure():
    command = f"{sys.executable} -m narrows passes | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_ctrl_c_that_python_drops_comes_again(run, monkeypatch: pytest.MonkeyPatch):
    class Dying:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def passes(arguments: object) -> int:
        Dying()
        return len(os.read(os.pipe()[0], 1))  # which nothing else ends

    monkeypatch.setattr("narrows.cli.inspect.passes", passes)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        assert run("passes") == (130, "", "interrupted\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_ctrl_c_that_python_drops_at_the_end_does_not_come_after_it(
    run, monkeypatch: pytest.MonkeyPatch
):
    class Dying:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def passes(arguments: object) -> int:
        Dying()
        return 0

    monkeypatch.setattr("narrows.cli.inspect.passes", passes)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run("passes")[0] == 0
        time.sleep(0.05)  # in which it would come
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
def test_too_little_memory_is_told(run, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def passes(arguments: object) -> int:
        raise error

    monkeypatch.setattr("narrows.cli.inspect.passes", passes)
    code, _, err = run("passes")
    assert code == 1
    assert "there is not enough memory" in err
    assert "a mistake in narrows" not in err


def test_ctrl_c_while_the_arguments_are_read(run, monkeypatch: pytest.MonkeyPatch):
    def interrupted(argv: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("narrows.cli.parser.parse", interrupted)
    assert run("passes") == (130, "", "interrupted\n")


def test_a_full_disk_is_told(run, monkeypatch: pytest.MonkeyPatch):
    def passes(arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some.file")

    monkeypatch.setattr("narrows.cli.inspect.passes", passes)
    code, _, err = run("passes")
    assert code == 1
    assert "there is no room" in err
    assert "some.file" in err
    assert "a mistake in narrows" not in err
