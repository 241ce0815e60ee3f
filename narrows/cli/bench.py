"""``narrows bench``: how fast an artifact is, against another, and why; or what operators cost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.backends.timing import Timing, inputs_of, measure, spread
from narrows.cli.commands import print_json
from narrows.cli.flags import refuse_idle
from narrows.cli.model import SOURCE
from narrows.errors import NarrowsError, UsageError

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact, TensorSpec
    from narrows.backends.measured.layout import Layout

ROUNDS = 15


def bench(arguments: argparse.Namespace) -> int:
    """Time artifacts, or calibrate."""
    if arguments.calibrate is not None:
        from narrows.cli.calibrate import calibrate

        return calibrate(arguments)
    why = "it is about measuring what operators cost (--calibrate)"
    refuse_idle(arguments, ("quick", "output", "runtime", "format", *SOURCE), why)
    if arguments.artifact is None:
        raise UsageError("there is nothing to time", hint="narrows bench ARTIFACT, or --calibrate")
    artifacts = _load(arguments)
    batches = _batches(arguments.batch, artifacts)
    if arguments.rounds < 1 or arguments.threads < 1:
        raise UsageError("--rounds and --threads take 1 or more")
    results = []
    for batch in batches:
        timings = measure(artifacts, batch, arguments.rounds, arguments.threads)
        results.append(_result(arguments, artifacts, timings, batch))
    profiled = _profiles(artifacts[0], batches) if arguments.profile else []
    if arguments.json:
        names = {"artifact": arguments.artifact, "against": arguments.against}
        more = {"profile": profiled} if arguments.profile else {}
        print_json({**names, "threads": arguments.threads, "results": results, **more})
        return 0
    for result in results:
        print(_text(arguments, result))
    for entry in profiled:
        print(_profile_text(entry))
    return 0


# ---------------------------------------------------------------------- what is timed


def _load(arguments: argparse.Namespace) -> list[Artifact]:
    from narrows.backends.artifact import load

    paths = [p for p in (arguments.artifact, arguments.against) if p is not None]
    artifacts = [load(path, trust=arguments.trust) for path in paths]
    if len(artifacts) == 2:
        mine, other = (list(map(_kind, a.inputs)) for a in artifacts)
        fits = len(mine) == len(other) and all(map(_alike, mine, other))
        if not fits:
            raise UsageError(
                "the artifacts take different inputs, so that there is nothing to compare",
                where=f"{arguments.artifact} and {arguments.against}",
                why=f"{_listed(artifacts[0])}; {_listed(artifacts[1])}",
            )
    return artifacts


def _kind(spec: TensorSpec) -> tuple[str, tuple[int | str, ...]]:
    return spec.dtype, spec.shape


def _alike(mine: tuple[str, Any], other: tuple[str, Any]) -> bool:
    """Whether two inputs can hold the same: a free axis meets any size."""
    sizes = zip(mine[1], other[1], strict=False)
    fits = all(a == b or isinstance(a, str) or isinstance(b, str) for a, b in sizes)
    return mine[0] == other[0] and len(mine[1]) == len(other[1]) and fits


def _listed(artifact: Artifact) -> str:
    return ", ".join(map(str, artifact.inputs)) or "nothing"


def _batches(text: str | None, artifacts: Sequence[Artifact]) -> list[int]:
    """Return the batch sizes to time; `UsageError` for one that an artifact cannot take."""
    fixed = {_fixed(a) for a in artifacts} - {None}
    if len(fixed) > 1:
        raise UsageError(
            "the artifacts were compiled for different batch sizes",
            why=" and ".join(map(str, sorted(fixed, key=str))),
        )
    if text is None:
        return [next(iter(fixed), None) or 1]
    words = [w.strip() for w in text.split(",")]
    if not all(w.isdigit() and int(w) > 0 for w in words):
        raise UsageError(f"--batch {text!r} is no list of batch sizes", hint="--batch 1,8")
    wanted = [int(w) for w in words]
    refused = [b for b in wanted if fixed and b not in fixed]
    if refused:
        raise UsageError(
            f"an artifact takes a batch of {next(iter(fixed))} only, not of {refused[0]}",
            why="it was compiled with --fixed-batch, or its model needs this size",
        )
    return wanted


def _fixed(artifact: Artifact) -> int | None:
    """Return the batch size that an artifact was compiled for; ``None`` if it is free."""
    if any(isinstance(s, str) for spec in artifact.inputs for s in spec.shape):
        return None
    sizes = [spec.shape[0] for spec in artifact.inputs if spec.shape]
    return int(sizes[0]) if sizes else 1


# ---------------------------------------------------------------------- what comes of it


def _result(
    arguments: argparse.Namespace, artifacts: list[Artifact], timings: list[Timing], batch: int
) -> dict[str, Any]:
    result: dict[str, Any] = {"batch": batch, "artifact": timings[0].to_json()}
    if len(timings) == 1:
        return result
    mine, other = timings
    ratio = spread([b / a for a, b in zip(mine.cpu, other.cpu, strict=True)])
    why = [] if ratio["low"] > 1 else why_not_faster(artifacts[0], artifacts[1])
    more = {"ratio": ratio, "verdict": verdict(ratio, why), "reasons": why}
    return {**result, "against": timings[1].to_json(), **more}


def verdict(ratio: dict[str, float], why: Sequence[str] = ()) -> str:
    """Return in plain words what a ratio of times, other to own, says.

    Args:
        ratio: Median, lower and upper quartile.
        why: What may be the cause where it is not faster.
    """
    middle, low, high = ratio["median"], ratio["low"], ratio["high"]
    if low > 1:
        return f"{middle:.2f}x faster ({low:.2f} to {high:.2f})"
    cause = f": {'; '.join(why)}" if why else ""
    if high < 1:
        return f"{1 / middle:.2f}x slower ({1 / high:.2f} to {1 / low:.2f}){cause}"
    return f"not faster: {middle:.2f}x ({low:.2f} to {high:.2f}){cause}"


def why_not_faster(artifact: Artifact, other: Artifact) -> list[str]:
    """Return what in an artifact's graph may keep it from being faster than another."""
    if artifact.target != "onnx" or other.target != "onnx":
        return []
    from narrows.backends.onnx.session import MODEL
    from narrows.backends.onnx.stairs import reasons

    try:
        return reasons(artifact.folder / MODEL, other.folder / MODEL, _layout())
    except ImportError:  # running needs the runtime alone, reading the graph needs onnx
        return []


def _layout() -> Layout:
    from narrows.backends.onnx.costs import TABLES

    return TABLES.current().layout


def _text(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    lines = [f"batch {result['batch']}, {arguments.threads} thread(s), {arguments.rounds} rounds"]
    width = max(len(str(arguments.artifact)), len(str(arguments.against or "")))
    for key in ("artifact", "against"):
        if key in result:
            lines.append(f"  {getattr(arguments, key):{width}}  {_times(result[key])}")
    if "verdict" in result:
        lines.append(f"  {result['verdict']}")
    return "\n".join(lines)


def _times(timing: dict[str, Any]) -> str:
    cpu, wall = timing["cpu_ms"], timing["wall_ms"]
    return (
        f"{cpu['median']:.3f} ms CPU ({cpu['low']:.3f} to {cpu['high']:.3f}), "
        f"{wall['median']:.3f} ms wall"
    )


# ---------------------------------------------------------------------- the runtime's own account


def _profiles(artifact: Artifact, batches: Sequence[int]) -> list[dict[str, Any]]:
    if artifact.target != "onnx":
        raise UsageError(f"--profile knows the onnx target, not {artifact.target}")
    from narrows.backends.onnx.costs import TABLES
    from narrows.backends.onnx.profile import profiled

    try:
        table = TABLES.current()
    except NarrowsError as error:
        print(f"no prediction: {error.what}", file=sys.stderr)
        table = None
    entries = []
    for batch in batches:
        nodes = profiled(Path(artifact.folder), inputs_of(artifact, batch), table)
        entries.append({"batch": batch, "nodes": nodes})
    return entries


def _profile_text(entry: dict[str, Any]) -> str:
    nodes = entry["nodes"]
    total = sum(n["us"] for n in nodes)
    lines = [f"batch {entry['batch']}: {total / 1e3:.3f} ms in {len(nodes)} nodes"]
    lines.append(f"  {'us':>9} {'table':>9}  node")
    for node in nodes:
        known = f"{node['predicted_us']:9.1f}" if node["predicted_us"] is not None else " " * 9
        lines.append(f"  {node['us']:9.1f} {known}  {node['op']} {node['shapes']}  {node['name']}")
    return "\n".join(lines)
