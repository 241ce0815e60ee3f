"""The command that puts mistakes into narrows: which, where they are tried, and what is counted."""

from __future__ import annotations

from argparse import Namespace
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.mutants import __main__ as command
from benchmarks.mutants import ctext, python
from benchmarks.mutants.__main__ import KILLED, Trial, closing, drawn, judged, try_rows
from benchmarks.mutants.apart import BROKEN, FAILED, PASSED, TIMEOUT, Ran, run
from benchmarks.mutants.claims import UNSAFE, Claim, others
from benchmarks.mutants.inside import Chosen
from benchmarks.mutants.rooms import ROOMS
from benchmarks.mutants.tree import changed
from narrows.ir.ops import table

PYTHON = '''
"""A docstring with 1 + 1."""
__all__ = ["f"]

@dataclass(frozen=True)
class Pair:
    first: int | None = 3

    def __repr__(self) -> str:
        return "1" + str(self.first)

def f(xs: list[int | str], limit: int = 0) -> int:
    if not xs or max(xs) <= limit:
        raise ValueError(f"{len(xs) - 1} is not enough" + str(1))
    total = xs[0] - min(xs)
    for x, _ in zip(xs, xs, strict=True):
        xs.append(x)
    assert total != 7
    return clip(total, -1)
'''
C = """
/* a < b */
#define MOST 3
static void f(const uint8_t *x, int count)
{
    int i = 0;

    for (i = 0; i < count && x[i] != 4; i++)
        sums[i] += x[i] * 2;
    printf("%d + 1", i);
}
"""


def changes(found: list) -> set[str]:
    return {m.change for m in found}


def test_mistakes_change_what_is_done_and_nothing_that_is_only_told() -> None:
    assert changes(python.mutants("f.py", PYTHON)) == {
        "constant: `3` -> `4`", "constant: `3` -> `2`", "constant: `0` -> `1`",
        "dropped guard: `not xs or max(xs) <= limit` -> `False`",
        "boolean: `or` -> `and`", "boolean: `not xs` -> `(xs)`", "extreme: `max` -> `min`",
        "comparison: `<=` -> `<`", "arithmetic: `-` -> `+`", "extreme: `min` -> `max`",
        "first and last: `0` -> `-1`", "dropped statement: `xs.append(x)` -> `pass`",
        "arguments: `total, -1` -> `-1, total`", "constant: `-1` -> `1`",
    }  # fmt: skip
    for mutant in python.mutants("f.py", PYTHON):
        assert python.is_other(mutant, PYTHON)


def test_mistakes_in_c_leave_comments_directives_and_texts_alone() -> None:
    assert changes(ctext.kernel_mutants("f.c", C)) == {
        "C constant: `0` -> `1`", "C comparison: `<` -> `<=`", "C boolean: `&&` -> `||`",
        "C comparison: `!=` -> `==`", "C constant: `4` -> `5`", "C arithmetic: `+=` -> `-=`",
        "C arithmetic: `*` -> `+`", "C constant: `2` -> `3`",
        "C dropped statement: `sums[i] += x[i] * 2;` -> `;`",
    }  # fmt: skip
    writer = 'def f(n):\n    """a + b;"""\n    return [f"y = x + {n + 3} * z[3];", "one"]\n'
    assert changes(ctext.written_mutants("f.py", writer)) == {
        "C arithmetic: `+` -> `-`", "C constant: `3` -> `4`"
    }  # fmt: skip


def test_the_seed_decides_what_is_drawn() -> None:
    one, again, other = (
        [m.key for m in islice(drawn(ROOMS["c"], seed), 10)] for seed in ("1", "1", "2")
    )
    assert one == again != other
    assert len(set(one)) == 10


def test_rows_claim_what_they_are_not() -> None:
    row = next(r for r in table.rows() if r.name == "relu.default")
    claims = {(trait, name) for trait, _, name in others(row)}
    assert {("partial", "True"), ("any_width", "False")} <= claims
    assert {("integer", "None"), ("work_kind", "'view'")} <= claims
    assert ("absorbs", "True") not in claims  # of a zero it makes a zero
    row = next(r for r in table.rows() if r.name == "cos.default")
    assert ("absorbs", "True") in {(trait, name) for trait, _, name in others(row)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a process that forks has threads
def test_a_run_tells_failures_from_what_cannot_run(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "tmp").mkdir()
    (tree / "known.py").write_text("VALUE = 3\n")
    (tree / "test_it.py").write_text(
        "import time, known\ndef test_one(): pass\ndef test_two(): assert known.VALUE == 3\n"
    )

    def tried(text: str, *tests: str, limit: float = 60.0) -> tuple[str, str]:
        names = [f"test_it.py::{t}" for t in tests]
        with changed(tree, "known.py", text.encode()):
            ran = run(tree, ["test_it.py"], lambda report: [Chosen(names, report)], limit)
        return ran.how, ran.test

    assert tried("VALUE = 3", "test_two") == (PASSED, "")
    assert tried("VALUE = 4", "test_one", "test_two") == (FAILED, "test_it.py::test_two")
    assert tried("VALUE = 4", "test_one") == (PASSED, "")
    assert tried("VALUE = ", "test_two") == (BROKEN, "")
    assert tried("while True: pass", "test_two", limit=1.0) == (TIMEOUT, "")
    assert (tree / "known.py").read_text() == "VALUE = 3\n"


def test_what_counts_as_killed() -> None:
    refused = "ArtifactError: /usr/bin/cc refuses the C code"
    runs = [Ran(PASSED), Ran(FAILED), Ran(TIMEOUT), Ran(BROKEN), Ran(FAILED, text=refused)]
    assert [judged(ran, True) for ran in runs] == [
        "survived", "killed", "killed", "not viable", "not viable"
    ]  # fmt: skip
    assert judged(runs[-1], False) == "killed"
    told = closing([{"room": "c", "how": judged(r, True), "ran": r.how} for r in runs])
    cells = [c.strip() for c in told.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["all", "3", "2", "1", "1", "0", "0", "2", "67%"]


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    options = Namespace(log=None, rooms=["c"], rows=False, tests=1, seconds=1.0)
    made = Trial(tmp_path, options)
    monkeypatch.setattr(made, "cover", lambda *rooms: None)
    return made


def test_what_fails_without_a_mutant_has_killed_nothing(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"how": KILLED, "tests": 1, "of": 1}
    trial.entries = [trial.blank("", "c", "f.c:1", "x") | found | {"test": t} for t in "aba"]
    monkeypatch.setattr(trial, "run", lambda ts: Ran(FAILED, "a") if "a" in ts else Ran(PASSED))
    trial.verify()
    assert [e["how"] for e in trial.entries] == ["survived", "killed", "survived"]
    for ended in (Ran(BROKEN), Ran(TIMEOUT)):  # before the first test
        monkeypatch.setattr(trial, "run", lambda ts, ended=ended: ended)
        with pytest.raises(SystemExit, match="cannot be run without a mutant"):
            trial.verify()


def test_what_is_no_mistake_by_now_is_none_whatever_the_log_says(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = next(drawn(ROOMS["c"], "1"))
    monkeypatch.setattr(command, "why_equivalent", lambda *_: "nothing changes")
    first = trial.mutant("c", mutant)
    trial.before = {first["key"]: first | {"how": "survived", "of": 1, "tests": 1}}
    assert trial.mutant("c", mutant)["how"] == "equivalent"
    monkeypatch.setattr(command, "why_equivalent", lambda *_: "")
    assert trial.mutant("c", mutant)["how"] == "survived"
    trial.before = {first["key"]: first}
    monkeypatch.setattr(command, "tests_of", lambda *_: [])
    assert trial.mutant("c", mutant)["how"] == "not covered"


def test_of_rows_as_many_count_as_are_asked_for(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, ways = (
        [f"row {i}" for i in range(9)],
        iter(["killed", "not viable", "survived", "killed"]),
    )
    found = [Claim(row, "any_width", 0, "any_width: True -> False", UNSAFE) for row in rows]
    monkeypatch.setattr(command.claims, "listed", lambda tree: found)
    monkeypatch.setattr(trial, "claim", lambda claim: {"how": next(ways)})
    try_rows(trial, Namespace(mutants=2, seed=0, only=[]))
    assert list(ways) == ["killed"]
