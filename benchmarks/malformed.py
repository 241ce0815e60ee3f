"""Files of strangers: every value in every kind of file that narrows reads, replaced by wrong ones.

    python -m benchmarks.malformed [--kinds onnx c plan ...] [--share 1.0] [--json F]

Manifests get their checksum made anew, as by somebody who wants to be believed. Each file is then
read and used as far as it goes: an artifact is loaded, described, run and checked, a plan applied,
a table asked, a dump shown. What comes out is counted: the file is taken, as what was changed does
not matter or is as good; it is refused by an error of the family; it was believed, and only the
comparison of results told that something wrong came of it; or something else is raised. Of the
last two there has to be none, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import narrows
from benchmarks.fuzz.judge import OWN_FAULT, found_by_itself
from benchmarks.machine import table, write
from narrows.backends.onnx.staircase import StairTable
from narrows.backends.store import MANIFEST, encode_manifest
from narrows.cli import main as command
from narrows.errors import NarrowsError
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.quant.plan import QuantPlan

Use = Callable[[Any], None]

VERDICTS = ("taken", "refused", "caught", "raised")

GONE = object()
WRONG: tuple[Any, ...] = (
    GONE, None, True, -1, 0, 7, 2**40, 2**70, 1.5, float("nan"), float("inf"), "", "x", "\0",
    "../x", "a\n", [], [None], [[[]]], {}, {"x": {}}, {"tensor": 5},
)  # fmt: skip
MOST = 3  # values of a long list that are replaced


class Small(nn.Module):
    """Two inputs, one of them by name, and a result that nests."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        y = self.second(torch.relu(self.first(x)))
        return {"y": (y, [y * scale]), "x": x, "n": 3}


class Plain(Small):
    """One input, one output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.second(torch.relu(self.first(x)))


X = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


def program(kind: type[nn.Module] = Plain) -> narrows.Program:
    """Return a small program."""
    torch.manual_seed(0)
    named = {"scale": torch.ones(2, 4, 1, 1)} if kind is Small else None
    return narrows.capture(kind().eval(), (X,), kwargs=named)


# ------------------------------------------------------------------ what is replaced


def variants(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield where a value is, and the data with a wrong one there, over and over."""
    for path in places(data):
        for wrong in WRONG:
            changed = copy.deepcopy(data)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            if wrong is GONE:
                del holder[path[-1]]
            else:
                holder[path[-1]] = copy.deepcopy(wrong)
            yield ".".join(map(str, path)), changed


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value, of the first ones where a list is long."""
    items = data.items() if isinstance(data, dict) else enumerate(data[:MOST])
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


# ------------------------------------------------------------------ how it is used


def quietly(*words: str) -> None:
    """Run a command; raise what it refuses, and what it takes for a mistake of its own."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(list(words))
    if "narrows failed" in err.getvalue():
        raise RuntimeError(err.getvalue())
    if code and not out.getvalue():
        raise NarrowsError(err.getvalue())


def artifact(artifact: narrows.Artifact, folder: Path, *inputs: Any, **named: Any) -> Any:
    """Return the manifest of an artifact, and what reads and runs it."""
    place = artifact.save(folder / artifact.target)

    def use(data: Any) -> None:
        (place / MANIFEST).write_text(encode_manifest(data))
        found = narrows.load(place)
        str((found.report, found, found.size, found.identity, found.plan, found.notes))
        quietly("check", str(place))
        if "dump" in data:
            quietly("show", str(place))
        found.run(*inputs, **named)
        found.save(folder / "again")

    return json.loads((place / MANIFEST).read_text()), use


def onnx(folder: Path) -> Any:
    """Return a float artifact with a plan and a nested result."""
    plan = narrows.plan(program(Small), ratio=0.25)
    made = narrows.lower(narrows.apply(program(Small), plan), plan=plan, samples=1)
    return artifact(made, folder, X.numpy(), scale=np.ones((2, 4, 1, 1), np.float32))


def integers(folder: Path, target: str, **options: Any) -> Any:
    """Return an integer artifact."""
    made = narrows.quantize(program(), [X]).program
    return artifact(narrows.lower(made, target, **options), folder, X[:1].numpy())


def torch_file(folder: Path) -> Any:
    """Return an artifact that is code, so that a changed one does not run."""
    return artifact(narrows.lower(program(), "torch", check=False), folder, X.numpy())


def dumped(folder: Path) -> Any:
    """Return the manifest of an artifact with a dump."""
    narrows.compile(Plain().eval(), (X,), dump=folder / "d").save(folder / "out", dump=folder / "d")
    return artifact(narrows.load(folder / "out"), folder, X.numpy())


def plan(folder: Path) -> Any:
    """Return a channel plan."""
    kept = program()

    def use(data: Any) -> None:
        read = ChannelPlan.from_json(data)
        narrows.apply(kept, read)
        read.masked(kept)

    return narrows.plan(kept, ratio=0.5).to_json(), use


def quantization(folder: Path) -> Any:
    """Return a quantization plan with codes and levels."""
    kept = program()
    options: dict[str, Any] = {"method": "rapq", "budget": 4, "activations": 3, "levels": True}
    made = narrows.quantize(kept, [X], **options, first_last=None).plan

    def use(data: Any) -> None:
        narrows.quantize(kept, plan=QuantPlan.from_json(data), check=False)

    return made.to_json(), use


def costs(folder: Path) -> Any:
    """Return a cost table, cut to a few grids."""
    from narrows.backends.onnx.costs import TABLES

    kept = program()
    data = TABLES.shipped().to_json()
    names = {name for name, _ in zip(data["grids"], range(4), strict=False)}
    data["grids"] = {n: g for n, g in data["grids"].items() if n in names or "conv 1x1" in n}
    data["works"] = data["works"][:2]

    def use(data: Any) -> None:
        StairTable.from_json(data).predict(kept)

    return data, use


def dump_file(name: str, folder: Path) -> Any:
    """Return a file of a dump, and what reads it."""
    place = folder / "d"
    narrows.compile(Plain().eval(), (X,), dump=place)

    def use(data: Any) -> None:
        (place / name).write_text(json.dumps(data))
        quietly("show", str(place), "--weights")
        quietly("why", str(place), "first")
        quietly("diff", f"{place}@0", str(place))
        quietly("couplings", str(place))

    return json.loads((place / name).read_text()), use


def checkpoint(folder: Path) -> Any:
    """Return what the checkpoint of a reconstruction says beside its tensors."""
    kept, path = program(), folder / "state.pt"
    options: dict[str, Any] = {"method": "rapq", "budget": 4, "check": False}
    narrows.quantize(kept, [X], checkpoint=path, **options)
    state = torch.load(path, weights_only=True)

    def use(data: Any) -> None:
        torch.save(data, path)
        narrows.quantize(kept, [X], checkpoint=path, **options)

    return state, use


KINDS: dict[str, Callable[[Path], Any]] = {
    "onnx": onnx,
    "integers": lambda folder: integers(folder, "onnx", form="integer"),
    "c": lambda folder: integers(folder, "c"),
    "torch": torch_file,
    "dumped": dumped,
    "plan": plan,
    "quantization": quantization,
    "costs": costs,
    "index": lambda folder: dump_file("index.json", folder),
    "snapshot": lambda folder: dump_file("000_capture.json", folder),
    "checkpoint": checkpoint,
}


def measure(kind: str, share: float = 1.0) -> dict[str, Any]:
    """Return what became of every changed file of a kind, or of a share of them."""
    counts: Counter[str] = Counter()
    raised: list[str] = []
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        data, use = KINDS[kind](Path(name))
        use(data)  # as it was, it is taken
        for place, changed in variants(data):
            if chance.random() > share:
                continue
            try:
                use(changed)
                counts["taken"] += 1
            except Exception as error:
                counts[verdict_on(error)] += 1
                if verdict_on(error) != "refused":
                    raised.append(f"{place}: {type(error).__name__}: {error}"[:200])
    return {"kind": kind, **{k: counts[k] for k in VERDICTS}, "errors": sorted(set(raised))}


def verdict_on(error: Exception) -> str:
    """Return what an error says of a file: a wrong result that was caught is not a refused file."""
    if not isinstance(error, NarrowsError):
        return "raised"
    # A command tells of an error by its text alone.
    return "caught" if found_by_itself(error) or OWN_FAULT in str(error) else "refused"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--share", type=float, default=1.0, help="of the changes that is tried")
    parser.add_argument("--json", help="where the results go")
    options = parser.parse_args()
    results = []
    for kind in options.kinds:
        results.append(measure(kind, options.share))
        found = results[-1]
        print({k: v for k, v in found.items() if k != "errors"}, flush=True)
        for line in found["errors"]:
            print(f"  {line}", flush=True)
    rows = [
        [r["kind"], *map(str, (sum(r[k] for k in VERDICTS), *(r[k] for k in VERDICTS)))]
        for r in results
    ]
    print(table(["kind", "changes", *VERDICTS], rows))
    write(options.json, {"results": results})
    return int(any(r["caught"] or r["raised"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
