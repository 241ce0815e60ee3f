"""Do the tests find small mistakes? Each is put into a copy of narrows, and tests are run on it.

    python -m benchmarks.mutants --mutants 100 --seed 0 --log mutants.jsonl  # again: goes on
    python -m benchmarks.mutants --rooms ir c --mutants 20
    python -m benchmarks.mutants --rows --mutants 200  # rows of the op table with a wrong claim

A mutant is killed if a test fails that passes without it, if the tests end by a signal, or if they
take many times as long. It survives if all of the tests pass that are tried: at most ``--tests`` of
those that run its line, for at most ``--seconds``. What no test runs counts as surviving. A mutant
with which narrows or a test file cannot be imported, or whose C text is no C, is not viable, and
another is drawn.

Which test runs which line is measured once for a state of the tree (half an hour for all rooms) and
kept in ``--kept``. At the end all tests that killed are run once more without any mutant; one that
fails then has killed nothing. A log's entries are taken as they are while narrows and the test that
killed are the same; others say which test to try first. Ctrl-C prints what is there. The tree is
left alone, and may be edited meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import digest, sources, table
from benchmarks.mutants import claims, ctext, python
from benchmarks.mutants.apart import BROKEN, CRASH, FAILED, PASSED, TIMEOUT, Ran, load, run
from benchmarks.mutants.cover import Cover, state
from benchmarks.mutants.covering import tests_of, tests_of_row, tests_of_table
from benchmarks.mutants.inside import Chosen, Claimed
from benchmarks.mutants.mutant import Mutant
from benchmarks.mutants.rooms import ROOMS, Room, why_equivalent
from benchmarks.mutants.tree import ROOT, changed, copied, text_of

KILLED, SURVIVED, NOT_COVERED, NOT_VIABLE, EQUIVALENT = (
    "killed", "survived", "not covered", "not viable", "equivalent",
)  # fmt: skip
NO_C = "refuses the C code"  # what narrows says where its C does not compile
COUNTED = (KILLED, SURVIVED, NOT_COVERED)
TABLE = ("ir", "quant")  # the rooms whose tests are tried on a row of the op table
KEPT = Path(tempfile.gettempdir()) / "narrows-mutants"


def drawn(room: Room, seed: str) -> Iterator[Mutant]:
    """Yield the mutants of a room in an order that the seed decides, each kind as often."""
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for file in room.paths():
        for mutant in mutants_of(file):
            kinds[mutant.kind].append(mutant)
    draw = random.Random(seed)
    for found in kinds.values():
        draw.shuffle(found)
    while kinds:
        c = [k for k in kinds if k.startswith("C ")]
        rest = [k for k in kinds if not k.startswith("C ")]
        kind = draw.choice(sorted(c if c and (not rest or draw.random() < 0.5) else rest))
        mutant = kinds[kind].pop()
        if not kinds[kind]:
            del kinds[kind]
        if mutant.file.endswith(".c") or python.is_other(mutant, text_of(mutant.file)):
            yield mutant


def mutants_of(file: str) -> list[Mutant]:
    """Return what can be changed in a file."""
    text = text_of(file)
    if file.endswith(".c"):
        return ctext.kernel_mutants(file, text)
    found = python.mutants(file, text)
    return found + (ctext.written_mutants(file, text) if "/backends/c/" in file else [])


class Trial:
    """Tries mutants on a copy of the tree and writes down what comes out."""

    def __init__(self, tree: Path, options: argparse.Namespace) -> None:
        self.tree, self.options = tree, options
        self.state, self.tests = state(tree), digest(tree, sources(tree, "tests"))
        self.log = Path(options.log) if options.log else None
        self.before: dict[str, dict[str, Any]] = {}
        if self.log is not None and self.log.exists():
            for line in self.log.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.before[entry["key"]] = entry
        self.entries: list[dict[str, Any]] = []
        self.covers: dict[tuple[str, ...], Cover] = {}

    def cover(self, *rooms: str) -> Cover:
        """Return what the tests of rooms run."""
        if rooms not in self.covers:
            found = {suite for room in rooms for suite in ROOMS[room].suites()}
            suites = sorted(s for s in found if (self.tree / s).exists())  # not what came since
            kept = Path(self.options.kept)
            self.covers[rooms] = Cover(self.tree, suites, kept, lambda s: _tell(f"# {s}"))
        return self.covers[rooms]

    def known(self, key: str) -> dict[str, Any] | None:
        """Return what the log says of a mutant in this tree, unless more is to be tried.

        It holds while the file of the test that killed is the same; that nothing killed, while all
        tests are.
        """
        entry = self.before.get(key)
        if entry is None or (entry["state"], entry["proof"]) != (self.state, self.proof(entry)):
            return None
        more = self.options.tests > entry["most"][0] or self.options.seconds > entry["most"][1]
        again = entry["how"] == SURVIVED and entry["tests"] < entry["of"] and more
        return None if again else entry

    def proof(self, entry: dict[str, Any]) -> str:
        """Return the hash of the tests that an entry depends on."""
        killer = self.tree / entry["test"].partition("::")[0]
        return (
            digest(self.tree, [killer])
            if entry["how"] == KILLED and killer.is_file()
            else self.tests
        )

    def add(self, entry: dict[str, Any], new: bool) -> None:
        entry["proof"] = self.proof(entry)
        self.entries.append(entry)
        _tell(line(entry))
        if new and self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def mutant(self, room: str, mutant: Mutant) -> dict[str, Any]:
        """Try a mutant; returns the log's entry."""
        text = text_of(mutant.file)
        key = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}:{mutant.key}"
        why = why_equivalent(mutant, text)
        entry = self.known(key)
        # What rooms.py says of a mutant may be newer than the log.
        if entry is not None and (entry["how"] == EQUIVALENT) == bool(why):
            self.add(entry, new=False)
            return entry
        entry = self.blank(key, room, f"{mutant.file}:{mutant.line}", mutant.change)
        cover = self.cover(room)
        tests = [] if why else tests_of(mutant, cover)
        if why or not tests:
            entry |= {"how": EQUIVALENT if why else NOT_COVERED, "text": why}
        else:
            chosen = self.chosen(tests, cover, mutant.file, key)
            with changed(self.tree, mutant.file, mutant.applied(text.encode())):
                ran = self.run(chosen)
            entry |= told(ran, len(chosen), len(set(tests)), mutant.kind.startswith("C "))
        self.add(entry, new=True)
        return entry

    def claim(self, claim: claims.Claim) -> dict[str, Any]:
        """Try a wrong claim of a row: on its own laws, and on what looks it up besides."""
        key = f"row:{claim.row}:{claim.change}"
        entry = self.known(key)
        if entry is not None:
            self.add(entry, new=False)
            return entry
        cover = self.cover(*TABLE)
        laws, looked = tests_of_row(claim.row, cover)
        laws = list(dict.fromkeys([*laws, *tests_of_table(cover)]))
        chosen = [*laws, *self.chosen(looked, cover, "narrows/ir/ops/rows.py", key)]
        ran = self.run(chosen, Claimed(claim.row, claim.number))
        entry = self.blank(key, claim.danger, claim.row, claim.change)
        entry |= told(ran, len(chosen), len(laws) + len(looked))
        self.add(entry, new=True)
        return entry

    def blank(self, key: str, room: str, place: str, change: str) -> dict[str, Any]:
        entry = {"key": key, "state": self.state, "room": room, "place": place, "change": change}
        most = [self.options.tests, self.options.seconds]
        return entry | {"test": "", "text": "", "tests": 0, "of": 0, "seconds": 0.0, "most": most}

    def chosen(self, tests: Sequence[str], cover: Cover, file: str, key: str) -> list[str]:
        """Return the tests to run, the one that killed before first."""
        chosen = cover.chosen(tests, file, self.options.tests, self.options.seconds)
        first = self.before.get(key, {}).get("test", "")
        if first in cover.tests:
            chosen = [first, *(t for t in chosen if t != first)]
        return chosen

    def run(self, tests: Sequence[str], *plugins: Any) -> Ran:
        """Run tests on the copy as it is."""
        usual = {t: n["seconds"] for cover in self.covers.values() for t, n in cover.tests.items()}
        limit = 60 + 10 * sum(usual.get(t, 1.0) for t in tests)  # other work may take the processor
        files = list(dict.fromkeys(t.partition("::")[0] for t in tests))
        return run(self.tree, files, lambda report: [*plugins, Chosen(tests, report)], limit)

    def verify(self) -> None:
        """Strike out the tests that fail without a mutant, too, and what they killed."""
        killers = sorted({e["test"] for e in self.entries if e["how"] == KILLED and e["test"]})
        if killers:
            self.cover(*(TABLE if self.options.rows else self.options.rooms))
        while killers:
            ran = self.run(killers)
            if ran.how == PASSED:
                return
            _tell(f"# fails without any mutant: {ran.test or ran.text}")
            if ran.test not in killers:  # nothing ran, or it ended before the first test
                raise SystemExit("the tests that killed cannot be run without a mutant")
            killers.remove(ran.test)
            for entry in self.entries:
                if entry["test"] == ran.test:
                    entry["how"] = SURVIVED
                    _tell(line(entry))


def judged(ran: Ran, in_c: bool) -> str:
    """Return what a run says of a mutant."""
    if ran.how == PASSED:
        return SURVIVED
    if ran.how == BROKEN or (in_c and NO_C in ran.text):
        return NOT_VIABLE
    return KILLED


def told(ran: Ran, tests: int, of: int, in_c: bool = False) -> dict[str, Any]:
    """Return what the log keeps of a run."""
    return {
        "how": judged(ran, in_c), "test": ran.test, "text": ran.text, "ran": ran.how,
        "tests": tests, "of": of, "seconds": round(ran.seconds, 1),
    }  # fmt: skip


def line(entry: dict[str, Any]) -> str:
    """Return what is printed of a mutant."""
    how = entry["how"]
    if how == KILLED:
        by = entry.get("ran", FAILED)
        how = f"killed by {entry['test']}" + (f" ({by})" if by in (TIMEOUT, CRASH) else "")
    elif how == SURVIVED:
        how = f"SURVIVED {entry['tests']} of {entry['of']} tests"
    elif how in (NOT_VIABLE, EQUIVALENT):
        how = f"{how}: {entry['text'].strip().splitlines()[-1] if entry['text'].strip() else ''}"
    return f"{entry['place']}  {entry['change']}  {how}"


def _tell(text: str) -> None:
    print(text, flush=True)


def closing(entries: Sequence[dict[str, Any]]) -> str:
    """Return the table of what came out, a line per room."""
    columns = (KILLED, SURVIVED, NOT_COVERED, EQUIVALENT, NOT_VIABLE)
    rows = []
    rooms = list(dict.fromkeys(e["room"] for e in entries))
    for room in [*rooms, "all"]:
        of = [e for e in entries if room in (e["room"], "all")]
        counts = [sum(e["how"] == how for e in of) for how in columns]
        tried = sum(counts[:3])
        late = sum(e["how"] == KILLED and e.get("ran") == TIMEOUT for e in of)
        share = f"{counts[0] / tried:.0%}" if tried else "-"
        rows.append(
            [room, str(tried), *map(str, counts[:1]), str(late), *map(str, counts[1:]), share]
        )
    header = ["room", "mutants", KILLED, "by time", *columns[1:], "killed of mutants"]
    return table(header, rows)


def try_rooms(trial: Trial, options: argparse.Namespace) -> None:
    """Try the mutants of the rooms in turns."""
    queues = {room: drawn(ROOMS[room], f"{options.seed} {room}") for room in options.rooms}
    tried = 0
    while tried < options.mutants and queues:
        for room in list(queues):
            while tried < options.mutants:
                mutant = next(queues[room], None)
                if mutant is None:
                    del queues[room]
                    break
                if trial.mutant(room, mutant)["how"] in COUNTED:
                    tried += 1
                    break


def try_rows(trial: Trial, options: argparse.Namespace) -> None:
    """Try wrong claims of rows."""
    tried = 0
    for claim in claims.drawn(claims.listed(trial.tree), options.seed, options.only):
        if tried >= options.mutants:
            return
        tried += trial.claim(claim)["how"] in COUNTED


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=100, help="how many count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=[*ROOMS])
    parser.add_argument("--rows", action="store_true", help="change what rows claim, not text")
    parser.add_argument("--only", nargs="+", default=[], help="with --rows: these rows")
    parser.add_argument("--tests", type=int, default=60, help="the most tests a mutant is tried on")
    parser.add_argument("--seconds", type=float, default=30.0, help="the most time they take")
    parser.add_argument("--log", help="a file of JSON lines that a later call goes on from")
    parser.add_argument("--kept", default=str(KEPT), help="where it is kept which test runs what")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    load()
    stopped = False
    for path in sources(ROOT, "narrows"):
        if path.suffix in (".py", ".c"):  # whoever edits the tree meanwhile does not matter
            text_of(str(path.relative_to(ROOT)))
    with copied() as tree:
        trial = Trial(tree, options)
        try:
            if options.rows:
                try_rows(trial, options)
            else:
                try_rooms(trial, options)
            trial.verify()
        except KeyboardInterrupt:
            stopped = True
    print()
    print(closing(trial.entries))
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
