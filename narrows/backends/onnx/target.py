"""`OnnxTarget`: program -> exported -> tidied -> simplified -> written -> checked.

Read `OnnxTarget.lower`; every stage is a module of this package. torch and the onnx packages are
imported when the target is used, not when it is looked up.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.backends.artifact import Artifact
from narrows.backends.base import Pair, Target, Track, Variant, Written
from narrows.backends.onnx.session import DATA, EXACT_PRODUCTS, MODEL
from narrows.backends.store import describe_files
from narrows.errors import LowerError, UsageError
from narrows.files.folders import scratch

if TYPE_CHECKING:
    import numpy as np

    from narrows.backends.compare import Wanted
    from narrows.backends.leaves import Leaves
    from narrows.backends.onnx.check import Checked
    from narrows.backends.onnx.export import Exported
    from narrows.backends.onnx.int8.table import Int8Table
    from narrows.backends.onnx.staircase import StairTable
    from narrows.ir.program import Program

PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxsim")

OPSETS = range(18, 26)  # what the exporter translates to; it leaves others as they are

# A protobuf message ends at 2^31 bytes; the graph itself needs a little of that.
PROTOBUF_LIMIT = 2_000_000_000

FORMS = ("qdq", "qlinear", "integer")  # of integer programs

# Two products of a uint8 and a code up to this one add up to less than 2**15.
SAFE_CODE = 64

OWN_SESSIONS = (
    f"a session that narrows does not open needs {'='.join(EXACT_PRODUCTS)}: without it ONNX "
    "Runtime cuts off products on x86 processors without VNNI; form=qlinear needs nothing"
)


@dataclass(frozen=True)
class OnnxTarget(Target):
    """Lowers a program to an ONNX file that runs in ONNX Runtime.

    Attributes:
        opset: The version of the ONNX operators, 18 to 25.
        simplify: Whether onnxsim simplifies the model.
        check: Whether the model is held to the program in ONNX Runtime.
        samples: How many inputs the check tries per batch size.
        inline_limit: Bytes of weights from which they go to a file of their own.
        form: How integer programs are written: ``qdq`` (fast in ONNX Runtime, readable by every
            runtime), ``qlinear`` or ``integer`` (see `narrows.backends.onnx.integer`).
    """

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "one ONNX file, checked in ONNX Runtime"
    measuring: ClassVar[str] = "narrows.backends.onnx.costs"
    measuring_integers: ClassVar[str] = "narrows.backends.onnx.int8.costs"
    packages: ClassVar[tuple[str, ...]] = PACKAGES
    rounds: ClassVar[bool] = True  # what coded weights multiply, where a program says so
    checking: ClassVar[str] = "run in ONNX Runtime against the program, batches of 1, 2 and 5"

    opset: int = 20
    simplify: bool = True
    check: bool = True
    samples: int = 2
    inline_limit: int = PROTOBUF_LIMIT
    form: str = "qdq"

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            known = f"{OPSETS[0]} to {OPSETS[-1]}"
            raise UsageError(f"onnx takes an opset from {known}, got {self.opset}")
        if self.form not in FORMS:
            raise UsageError(f"onnx takes the form {', '.join(FORMS)}, got {self.form!r}")
        if self.samples < 1:
            raise UsageError(f"onnx takes 1 sample or more, got {self.samples}")
        if self.inline_limit > PROTOBUF_LIMIT:
            raise UsageError(
                f"onnx takes an inline_limit up to {PROTOBUF_LIMIT:,}, got {self.inline_limit:,}",
                why="a protobuf message cannot be larger",
            )

    @classmethod
    def available(cls) -> str | None:
        """Return which packages are missing, or ``None``."""
        missing = [name for name in cls.packages if importlib.util.find_spec(name) is None]
        return (
            f"it needs {', '.join(missing)}: pip install {' '.join(missing)}" if missing else None
        )

    @classmethod
    def variants(cls) -> list[Variant]:
        """Return the one row of this target."""
        missing = cls.available() or ""
        needs, here = ", ".join(cls.packages[1:]), not missing
        return [Variant(cls.name, needs, missing, "any batch size, CPU", cls.checking, here, here)]

    def costs(self) -> StairTable:
        """Return the costs measured on this machine, else those that narrows ships."""
        from narrows.backends.onnx.costs import TABLES

        return TABLES.current()

    def track(self) -> AbstractContextManager[Track]:
        """Return where programs are timed in ONNX Runtime; see `Target.track`."""
        from narrows.backends.onnx.session import OnnxSession
        from narrows.backends.timing import Trial, here

        def trial(program: Program, batch: int) -> Trial:
            weights: dict[str, np.ndarray] = {}
            model, arrays = self.draft(program, batch, weights)
            session = OnnxSession(model, threads=1, weights=weights)
            return here(lambda: session.run(arrays))

        return nullcontext(trial)

    def draft(
        self, program: Program, batch: int, apart: dict[str, np.ndarray] | None = None
    ) -> tuple[bytes, dict[str, np.ndarray]]:
        """Return a model file that takes as long as the one that is written, and made-up inputs.

        Args:
            program: The program, of floats or of integers.
            batch: The number of examples.
            apart: Where weights are left that the file is to be without.

        Raises:
            LowerError: It has no ONNX form, or is too large.
        """
        from narrows.backends import integers
        from narrows.backends.leaves import Leaves
        from narrows.backends.onnx.draft import draft
        from narrows.backends.onnx.integer.lower import lower
        from narrows.backends.timing import drawn

        if sum(t.nbytes for t in program.weights.values()) >= PROTOBUF_LIMIT:
            raise LowerError(f"{program.name} is too large for one file in memory")
        leaves = Leaves.of(program)
        if integers.is_integer(program):
            made = lower(program, leaves.computed, self.form, self.opset)
        else:
            made = draft(program, leaves.computed, self.opset, apart)
        specs = ((s["name"], s["shape"], s["dtype"]) for s in leaves.specs(program)[0])
        return made.SerializeToString(), drawn(specs, batch)

    def integer_costs(self) -> Int8Table:
        """Return the costs of integers measured on this machine, else those that narrows ships."""
        from narrows.backends.onnx.int8.costs import TABLES

        return TABLES.current()

    def write(self, pair: Pair, plan_json: Any = None) -> Written:
        """Return the program as an ONNX artifact; see `Target.write`."""
        from narrows.backends import integers
        from narrows.backends.compare import FLAT, Wanted
        from narrows.backends.leaves import Leaves
        from narrows.backends.manifest import add_note, new_manifest
        from narrows.backends.onnx.check import BATCHES

        program = pair.lowered
        leaves = Leaves.of(program)
        integers.refuse_fake(program)
        whole = integers.is_integer(program)
        exported = self._integers(program, leaves) if whole else self._floats(program, leaves)
        manifest = new_manifest(
            self, program, leaves, exported.inputs, exported.outputs, plan_json, self.packages
        )
        folder = scratch()
        artifact = Artifact.owning(folder, manifest)  # from here on the folder goes with it
        self._warn(manifest, exported.model, whole)
        manifest["files"] = write(exported.model, folder, self.inline_limit)
        if not self.check:
            return Written(artifact)
        if whole:
            integers.add_golden(artifact, pair.reference)
        batches = BATCHES if pair.reference.dynamic_batch else (None,)
        wanted = Wanted.of(pair.reference, batches, self.samples)
        where = program.output.name

        def complete(again: Callable[[], Pair]) -> None:
            checked = self._checked(artifact, wanted, again, whole)
            manifest["fidelity"] = checked.fidelity
            for remark in checked.remarks:
                add_note(manifest, "rounding", where, remark)
            if wanted.flat:
                add_note(manifest, "check", where, FLAT)

        return Written(artifact, complete)

    def _warn(self, manifest: dict[str, Any], model: Any, whole: bool) -> None:
        """Note what whoever opens the file without narrows has to know."""
        from narrows.backends.manifest import add_note

        if whole and self.form == "qdq" and overflows(model):
            add_note(manifest, "session", MODEL, OWN_SESSIONS)

    def _checked(
        self, artifact: Artifact, wanted: Wanted, again: Callable[[], Pair], whole: bool
    ) -> Checked:
        """Return what a comparison of the artifact with what it has to give found.

        Args:
            artifact: The artifact.
            wanted: What it has to give.
            again: Returns the program again.
            whole: Whether it is one of integers.
        """
        from narrows.backends.onnx.check import check

        return check(artifact, wanted, again, exact=whole)

    def _floats(self, program: Program, leaves: Leaves) -> Exported:
        """Return the model of a float program, written by rules, else through ``torch.onnx``."""
        from narrows.backends.onnx.blocks import dense, pack
        from narrows.backends.onnx.export import Exported, export
        from narrows.backends.onnx.floats import written
        from narrows.backends.onnx.simplify import simplify
        from narrows.backends.onnx.tidy import tidy

        whole, packed = dense(program)
        if not self.rounds and any(weight.rounded for weight in packed.values()):
            raise LowerError(
                f"{self.name} does not round what coded weights multiply",
                why="the program was made with activations='dynamic'",
                hint="quantize_weights(..., activations='float'), or the target onnx",
            )
        outputs = [whole.node(node.name) for node in leaves.computed]
        model = written(whole, outputs, self.opset)
        if model is None:
            exported = export(whole, outputs, self.opset)
            model = exported.model
        else:
            exported = Exported(model, *leaves.specs(program))
        tidy(model, program.name, whole.weights)
        if self.simplify:
            model = simplify(model)
            tidy(model, program.name, whole.weights)
        return dataclasses.replace(exported, model=pack(model, packed) if packed else model)

    def _integers(self, program: Program, leaves: Leaves) -> Exported:
        """Return the model of an integer program, built node by node."""
        import onnx_ir

        from narrows.backends.onnx.export import Exported
        from narrows.backends.onnx.integer.lower import lower

        made = lower(program, leaves.computed, self.form, self.opset)
        model = onnx_ir.from_proto(made)
        specs = [
            [describe_value(v) for v in side] for side in (made.graph.input, made.graph.output)
        ]
        return Exported(model, *specs)


def describe_value(value: Any) -> dict[str, Any]:
    """Return name, shape and dtype of an input or output, the batch as ``"b"``."""
    import numpy as np
    from onnx import helper

    kind = value.type.tensor_type
    shape = ["b" if d.dim_param else d.dim_value for d in kind.shape.dim]
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return {"name": value.name, "shape": shape, "dtype": dtype}


def overflows(model: Any) -> bool:
    """Whether an `onnx_ir.Model` has int8 weights whose products some processors cut off."""
    import numpy as np
    import onnx_ir as ir

    weights = (value.const_value for value in model.graph.initializers.values())
    return any(
        bool((np.abs(weight.numpy().astype(np.int16)) > SAFE_CODE).any())
        for weight in weights
        if weight.dtype == ir.DataType.INT8
    )


def write(model: Any, folder: Path, inline_limit: int) -> dict[str, Any]:
    """Write an `onnx_ir.Model`, check it against the ONNX specification, and describe its files.

    Weights of ``inline_limit`` bytes and more in all go to a file of their own. The model is left
    without them: it is full of cycles, and would keep them in memory until those are collected.
    """
    import onnx_ir as ir

    from narrows.backends.onnx.modelfile import write_model
    from narrows.backends.onnx.simplify import put_weights, take_weights

    path = folder / MODEL
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    weights = take_weights(model)
    proto = ir.to_proto(model)
    check_specification(proto)
    if total >= inline_limit:
        put_weights(model, weights)
        ir.save(model, path, external_data=DATA)
        take_weights(model)
    else:
        write_model(proto, weights, path)
    return describe_files(folder, [name for name in (MODEL, DATA) if (folder / name).exists()])


def check_specification(proto: Any) -> None:
    """Raise `LowerError` if a model, whose weights may be inputs, breaks the ONNX specification."""
    import onnx.checker

    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # two classes of the checker, and one of shape inference
        why = str(error).strip().partition("\n")[0]
        raise LowerError("the exported model breaks the ONNX specification", why=why) from error
