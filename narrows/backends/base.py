"""`Target`: something a program can be lowered to, found by its name.

A target is a frozen dataclass; its fields are its options, and those made by
`narrows.options.option` have flags of ``narrows compile``. `TARGETS` says where each one lives. It
is imported on use, so that a machine without a target's packages still has the others. A package
adds its own through an entry point, and says in a second one how its artifacts run
(`narrows.backends.sessions`)::

    [project.entry-points."narrows.targets"]
    json = "mypackage.target:JsonTarget"
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.errors import LowerError, UsageError, unknown_option
from narrows.files.folders import with_room
from narrows.ir.tracing import alone
from narrows.registry import Registry

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.backends.timing import Trial
    from narrows.ir.costs import Costs
    from narrows.ir.program import Program

TARGETS = Registry(
    "target",
    "narrows.targets",
    {
        "c": "narrows.backends.c:CTarget",
        "onnx": "narrows.backends.onnx:OnnxTarget",
        "openvino": "narrows.backends.openvino:OpenvinoTarget",
        "torch": "narrows.backends.torch:TorchTarget",
        "tvm": "narrows.backends.tvm:TvmTarget",
    },
    LowerError,
)

# Makes a program ready to run for so many examples, and returns what times it; `LowerError` where
# the target cannot express it.
Track = Callable[["Program", int], "Trial"]

KINDS = "kinds"  # the key, in the metadata of a target's field, of the types that it takes


@dataclass(frozen=True)
class Variant:
    """One row of the table of targets.

    Attributes:
        name: The spelling on the command line: ``onnx``, ``tvm:llvm``.
        needs: What has to be installed.
        missing: What of it is not here, or does less than it could; empty where all is well.
        supports: What it is for.
        checked: How what it makes is held to the program.
        lowers: Whether a program can be lowered to it here.
        usable: Whether what comes out runs here, too.
    """

    name: str
    needs: str
    missing: str
    supports: str
    checked: str
    lowers: bool
    usable: bool


@dataclass(frozen=True)
class Pair:
    """A program that is lowered, and what the artifact has to equal; often they are one."""

    lowered: Program
    reference: Program


@dataclass(frozen=True)
class Written:
    """An artifact whose files are written, and the check that it has to pass yet.

    It holds what the program gives, not the program: whoever made one may let go of its weights
    before a runtime takes memory for its own.

    Attributes:
        artifact: The artifact.
        check: Runs the artifact, and completes its manifest. It is given a function that returns
            the program again, for where an output differs and the first such node is looked for.
    """

    artifact: Artifact
    check: Callable[[Callable[[], Pair]], None] = lambda again: None

    @alone
    def settled(self, again: Callable[[], Pair]) -> Artifact:
        """Return the artifact, checked; `LowerError` if it computes something else."""
        with with_room():
            self.check(again)
        return self.artifact


@dataclass(frozen=True)
class Target(ABC):
    """Turns programs into artifacts; the fields of a subclass are its options.

    Attributes:
        name: The spelling on the command line.
        summary: One line for a person who chooses among the targets.
        measuring: The module that measures what operators cost on it, if there is one: it has
            ``TABLES``, a `narrows.backends.tables.Tables`, and a function ``calibrate``; and
            ``measure_works`` if it can measure the operators of a model
            (`narrows.backends.onnx.costs`).
        measuring_integers: The module that measures them for integer programs, if there is one: its
            ``calibrate`` is given what captures and lowers networks
            (`narrows.backends.onnx.int8.costs`).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    measuring: ClassVar[str] = ""
    measuring_integers: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def available(cls) -> str | None:
        """Return why the target cannot be used on this machine, or ``None``."""

    @classmethod
    @abstractmethod
    def variants(cls) -> list[Variant]:
        """Return the rows of the table of targets that are this one's."""

    @abstractmethod
    def write(self, pair: Pair, plan_json: Any = None) -> Written:
        """Return a program as an artifact that is to be checked yet.

        Args:
            pair: The program and its reference; they stay as they are.
            plan_json: The channel plan that made it, as JSON data, to be kept with the artifact.

        Raises:
            LowerError: The target cannot express the program.
        """

    def costs(self) -> Costs | None:
        """Return what operators cost on this target, here; ``None`` where that is not known.

        The table is measured on this machine where someone has calibrated, else it is one that
        narrows ships; its ``cpu`` and ``runtime`` say so.
        """
        return None

    def track(self) -> AbstractContextManager[Track] | None:
        """Return where programs are timed here, each on one thread, before any of them is lowered.

        A program is made to run in a fraction of the time that an artifact takes, is checked by
        nobody, and takes as long as the artifact does. ``None`` where there is no such way: the
        target is another machine, or makes nothing quickly; then `untimed` says why.
        """
        return None

    @property
    def untimed(self) -> str:
        """Why no program is timed here (`track`)."""
        return f"the target {self.name} runs nothing at once here"

    def integer_costs(self) -> Costs | None:
        """Return what operators cost once their program is in integers, as `costs` does.

        They are asked of the program in floats, before it is quantized. Where nothing is known of
        integers, they are those of floats.
        """
        return self.costs()


def target_names() -> list[str]:
    """Return the names of all targets."""
    return sorted(TARGETS.providers())


def target_type(name: str) -> type[Target]:
    """Return the class of a target; `UsageError` with a suggestion if there is none."""
    found = TARGETS.load_class(name)
    if not isinstance(found, type) or not issubclass(found, Target):
        raise LowerError(f"the target {name!r} of {TARGETS.providers()[name]} is no Target")
    return found


def make_target(target: str | Target = "onnx", **options: Any) -> Target:
    """Return a target with the given options.

    Args:
        target: A name, a name and a device such as ``tvm:llvm``, or a target, whose options are
            then replaced.
        **options: Values for the target's fields.

    Raises:
        UsageError: The target or an option is unknown, or an option has the wrong type.
    """
    if isinstance(target, Target):
        if not options:
            return target
        _check_options(type(target), options)
        return dataclasses.replace(target, **options)
    if not isinstance(target, str):
        raise UsageError(
            f"a target is a name or a Target, got {type(target).__name__}",
            why=f"the targets are: {', '.join(target_names())}",
        )
    name, colon, device = target.partition(":")
    kind = target_type(name)
    if colon:
        if "device" in options:
            raise UsageError(f"{target} names a device, and so does the option 'device'")
        options = {"device": device, **options}
    _check_options(kind, options)
    return kind(**options)


def lower(
    program: Program,
    target: str | Target = "onnx",
    *,
    plan_json: Any = None,
    reference: Program | None = None,
    **options: Any,
) -> Artifact:
    """Return the program as an artifact of ``target``, checked.

    Args:
        program: The program; it stays as it is.
        target: A target or its name.
        plan_json: The channel plan that made the program, as JSON data, kept with the artifact.
        reference: What the artifact has to equal; the program itself by default.
        **options: Options of the target.

    Raises:
        UsageError: The target or an option is unknown.
        LowerError: The target is not available here, cannot express the program, or computes
            something else.
        ArtifactError: The disk is full.
    """
    wanted = program if reference is None else reference
    pair = Pair(in_types_of_numpy(program), in_types_of_numpy(wanted))
    return write(pair, target, plan_json, **options).settled(lambda: pair)


def costs_of(target: str | Target, integers: bool = False) -> Costs | None:
    """Return a target's cost table, or ``None`` if it has none.

    Args:
        target: A target or its name.
        integers: Whether they are to be of programs that will be in integers.
    """
    made = make_target(target)
    return made.integer_costs() if integers else made.costs()


@alone
def write(
    pair: Pair, target: str | Target = "onnx", plan_json: Any = None, **options: Any
) -> Written:
    """Return what `lower` does before the check."""
    chosen = make_target(target, **options)
    reason = chosen.available()
    if reason is not None:
        raise LowerError(f"the target {chosen.name} is not available", why=reason)
    with with_room():
        return chosen.write(pair, plan_json)


def in_types_of_numpy(program: Program) -> Program:
    """Return a program that has bfloat16 in float32, with a note: NumPy has no such type, and
    runtimes hardly any operator for it."""
    import torch

    from narrows.ir.meta import Meta
    from narrows.ir.program import Note

    dtypes = {Meta(n).dtype for n in program.graph.nodes}
    if torch.bfloat16 not in dtypes:
        return program
    if dtypes & {torch.float16, torch.float64}:
        raise LowerError(
            f"{program.name} computes in bfloat16 and in another type",
            why="bfloat16 is lowered as float32, and so would be the other",
            hint="choose one: program.to(torch.float32)",
        )
    text = "bfloat16 is lowered as float32, which holds every such number; in and out, too"
    note = Note(program.name, "bfloat16", text)
    return program.to(torch.float32).replace(notes=(*program.notes, note))


def _check_options(kind: type[Target], options: dict[str, Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in options.items():
        if key not in fields:
            raise unknown_option(kind.name, key, fields)
        # Options are plain values, so the type of the default is the type of the option, unless
        # the field says that there are more.
        kinds = fields[key].metadata.get(KINDS, (type(fields[key].default),))
        if not isinstance(value, kinds) or isinstance(value, bool) is not (bool in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            raise UsageError(f"option {key!r} of {kind.name} takes {wanted}, got {value!r}")
