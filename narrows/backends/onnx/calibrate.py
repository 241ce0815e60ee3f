"""Measures ONNX Runtime on this machine: `sweep` fills the grids of a cost table.

Times come from the runtime's own profile of graphs of probes, of the runs that were disturbed least
(see `narrows.backends.onnx.steady`); of these the quicker half is averaged, because what else runs
on the machine can only add. ONNX Runtime runs on the calling thread alone, so that a time is one
core's. What the profile itself adds to a node is measured first, and taken off.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from narrows.backends.measured.layout import Layout
from narrows.backends.onnx.probes import POINTWISE, Bench, Point, random_feeds
from narrows.backends.onnx.steady import Quiet, quietest
from narrows.backends.onnx.sweep import Job, exact, jobs
from narrows.files.folders import temporary
from narrows.ir.work import Work

WARM = 2  # runs that no one counts
LARGEST = 48_000_000  # bytes of weights in one graph
LEAST = 0.1  # microseconds that anything takes
MOST = 16  # probes in one graph
PROBE = re.compile(r"probe(\d+)_")

Times = dict[str, dict[tuple[float, ...], float]]


@dataclass
class Node:
    """One node of an optimized graph with its times.

    Attributes:
        name: Its name.
        op: Its type.
        inputs: The shapes it read; ``outputs``: the shapes it made.
        us: The microseconds of each undisturbed run.
    """

    name: str
    op: str
    inputs: list[list[int]]
    outputs: list[list[int]]
    us: list[float]

    @property
    def typical(self) -> float:
        """The mean of the quicker half of the runs, in microseconds."""
        return quick_half(self.us)


def quick_half(values: Sequence[float]) -> float:
    """Return the mean of the smaller half of some times."""
    return float(np.mean(sorted(values)[: (len(values) + 1) // 2]))


def profile(
    model: bytes | Path,
    feeds: dict[str, np.ndarray] | None = None,
    *,
    rounds: int,
    batch: int = 1,
    quiet: Quiet | None = None,
) -> list[Node]:
    """Return the nodes of a model as ONNX Runtime runs them, in order, with their times.

    Args:
        model: The model, or its file.
        feeds: The inputs; random numbers by default.
        rounds: How many runs count.
        batch: The size of free axes of random inputs.
        quiet: Tells which runs were disturbed.
    """
    import onnxruntime

    quiet = quiet or Quiet()
    with temporary() as folder:
        options = single_thread()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
        values = feeds or random_feeds(session, batch)
        for _ in range(WARM):
            session.run(None, values)
        runs = quiet.runs(lambda: session.run(None, values), rounds)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _nodes(events, {i + WARM for i in quietest([slowed for _, slowed in runs], rounds)})


def single_thread() -> Any:
    """Return the options of a session that runs on the calling thread and keeps quiet."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _nodes(events: list[dict[str, Any]], counted: set[int]) -> list[Node]:
    found: dict[str, Node] = {}
    counts: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        details = event["args"]
        name = event["name"].removesuffix("_kernel_time")
        if name not in found:
            shapes = [
                [next(iter(s.values())) for s in details.get(key, ())]
                for key in ("input_type_shape", "output_type_shape")
            ]
            found[name] = Node(name, details["op_name"], shapes[0], shapes[1], [])
        if counts[name] in counted:
            found[name].us.append(float(event["dur"]))
        counts[name] += 1
    return list(found.values())


# ---------------------------------------------------------------------- what it does with layouts


def optimized_ops(model: bytes) -> list[str]:
    """Return the node types that ONNX Runtime makes of a model."""
    import onnx
    import onnxruntime

    with temporary() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # it warns that the graph is for this machine alone
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return [node.op_type for node in graph.node]


def find_layout() -> Layout:
    """Return what ONNX Runtime does with layouts on this machine, from small graphs."""

    def ops(add: Callable[[Bench], str]) -> list[str]:
        bench = Bench()
        bench.use(add(bench))
        return optimized_ops(bench.model())

    space = (8, 8)
    if "ReorderInput" not in ops(lambda b: b.blocks(1, 64, space)):
        return Layout(fused=_acting(ops, plain=True)[0])

    def joined(width: int) -> bool:
        def add(b: Bench) -> str:
            parts = [b.blocks(1, width, space) for _ in range(2)]
            return b.node("Concat", parts, (1, 2 * width, *space), axis=1)

        found = ops(add)
        return "ReorderOutput" not in found[: found.index("Concat")]

    block = next((b for b in (8, 16, 32) if joined(b)), 16)

    def aligned(width: int) -> bool:
        found = ops(lambda b: b.conv(b.blocks(1, width, space), 2 * block, (3, 3)))
        return "FusedConv" not in found

    align = next((a for a in (1, 2, 4, 8) if aligned(block + a)), block)
    fused, blocked = _acting(ops)
    return Layout(block, align, 4, fused, blocked)


def _acting(
    ops: Callable[[Callable[[Bench], str]], list[str]], *, plain: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the operators that go into a convolution, and those that run on blocks."""
    fused, blocked = [], []
    for op in POINTWISE:
        if op in ("mul", "add"):
            blocked.append(op)
            continue

        def add(b: Bench, op: str = op) -> str:
            x = b.conv(b.input(1, 64, 8, 8), 64, after="")
            return b.pointwise(op, x)

        found = ops(add)
        between = [o for o in found if o not in ("Conv", "FusedConv", "ReorderInput")]
        if not between or between == ["ReorderOutput"]:
            fused.append(op)
        if not plain and found.count("ReorderOutput") == 1:
            blocked.append(op)
    return tuple(fused), tuple(blocked)


# ---------------------------------------------------------------------- sweeping


def sweep(
    layout: Layout,
    *,
    quick: bool,
    rounds: int,
    bias: float,
    quiet: Quiet,
    tell: Callable[[int, int], None],
) -> Iterator[Times]:
    """Yield the times of one graph of probes after another.

    Args:
        layout: What the runtime does with layouts.
        quick: Whether to measure few sizes.
        rounds: The runs of each graph.
        bias: The microseconds that profiling adds to a node.
        quiet: Tells which runs were disturbed.
        tell: Called with the graphs that are done and those that there are.
    """
    packed = list(pack(jobs(layout, quick)))
    for done, group in enumerate(packed):
        tell(done, len(packed))
        yield measure(group, rounds, bias, quiet)
    tell(len(packed), len(packed))


def pack(wanted: Iterable[Job]) -> Iterator[list[Job]]:
    """Yield lists of jobs that go well into one graph: of one size, and not too many."""
    rooms: dict[tuple[int, ...], list[Job]] = defaultdict(list)
    weights: dict[tuple[int, ...], int] = defaultdict(int)
    for job in wanted:
        room = rooms[job.room]
        if room and (len(room) >= MOST or weights[job.room] + job.weight > LARGEST):
            yield rooms.pop(job.room)
            weights[job.room] = 0
            room = rooms[job.room]
        room.append(job)
        weights[job.room] += job.weight
    yield from (room for room in rooms.values() if room)


def find_overhead(quiet: Quiet) -> tuple[float, float]:
    """Return what a node takes whatever its size, and what profiling adds to it: microseconds."""
    chain, count = Bench(), 200
    x = chain.input(1, 4)
    for _ in range(count):
        x = chain.node("Tanh", [x], (1, 4))
    chain.use(x, conv=False)
    own = cpu_time(chain.model(), rounds=20, quiet=quiet) * 1e6 / count
    # What profiling adds shows on nodes as models have them, each with its weights out of cache.
    real = Bench()
    for width in (16, 24, 32, 48, 64) * 4:
        real.use(real.conv(real.blocks(1, width, (7, 7)), width, (3, 3), groups=width))
    nodes = profile(real.model(), rounds=20, quiet=quiet)
    whole = cpu_time(real.model(), rounds=20, quiet=quiet) * 1e6
    return own, max(0.0, (sum(n.typical for n in nodes) - whole) / len(nodes))


def cpu_time(
    model: bytes | Path, *, rounds: int, batch: int = 1, quiet: Quiet | None = None
) -> float:
    """Return the CPU seconds of one run, without a profile: of the quicker half of the runs."""
    import onnxruntime

    quiet = quiet or Quiet()
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, single_thread(), ["CPUExecutionProvider"])
    feeds = random_feeds(session, batch)
    for _ in range(WARM):
        session.run(None, feeds)
    runs = quiet.runs(lambda: session.run(None, feeds), rounds)
    return quick_half([runs[i][0] for i in quietest([slowed for _, slowed in runs], rounds)])


def measure(
    group: Sequence[Job], rounds: int, bias: float, quiet: Quiet, bench: Bench | None = None
) -> Times:
    """Return the times of a graph of probes, in microseconds by grid and sizes.

    Args:
        group: The probes.
        rounds: How often the graph is run.
        bias: The microseconds that profiling adds to a node.
        quiet: Tells which runs were disturbed.
        bench: What the probes are added to; a graph of floats by default.
    """
    bench = bench or Bench()
    for job in group:
        job.add(bench)
    nodes = profile(bench.model(), rounds=rounds, quiet=quiet)
    spent = [0.0] * len(bench.probes)
    times: Times = defaultdict(dict)
    reorders: dict[tuple[str, float], list[float]] = defaultdict(list)
    for node in nodes:
        tagged = PROBE.search(node.name)
        if node.op in ("ReorderInput", "ReorderOutput"):
            shape = node.inputs[0] if node.op == "ReorderOutput" else node.outputs[0]
            kind = "reorder out" if node.op == "ReorderOutput" else "reorder in"
            reorders[kind, float(np.prod(shape))].append(max(LEAST, node.typical - bias))
        elif tagged:
            spent[int(tagged[1])] += max(LEAST, node.typical - bias)
    for point, us in zip(bench.probes, spent, strict=True):
        if isinstance(point, Point) and us > 0:
            less = spent[point.minus] if point.minus >= 0 else 0.0
            sizes = tuple(v for _, v in point.sizes)
            times[point.grid][sizes] = max(LEAST, us - less) / point.share
    for (kind, elements), values in reorders.items():
        times[kind][(elements,)] = quick_half(values)
    return times


def measure_works(
    works: Sequence[Work],
    *,
    rounds: int,
    bias: float,
    quiet: Quiet,
    tell: Callable[[int, int], None],
) -> Iterator[dict[Work, float]]:
    """Yield the seconds of exactly these works, some at a time; what has no probe is left out."""
    packed = list(pack(filter(None, map(exact, works))))
    for done, group in enumerate(packed):
        tell(done, len(packed))
        bench = Bench()
        for job in group:
            job.add(bench)
        spent: dict[Work, float] = {}
        for node in profile(bench.model(), rounds=rounds, quiet=quiet):
            tagged = PROBE.search(node.name)
            if tagged and node.op not in ("ReorderInput", "ReorderOutput"):
                work = bench.probes[int(tagged[1])]
                spent[work] = spent.get(work, 0.0) + max(LEAST, node.typical - bias) * 1e-6
        yield spent
    tell(len(packed), len(packed))
