"""`TorchTarget`: program -> module -> exported, or compiled ahead of time -> checked.

torch is imported when the target is used, not when it is looked up.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.backends.artifact import Artifact
from narrows.backends.base import Pair, Target, Track, Variant, Written
from narrows.backends.store import describe_files
from narrows.backends.torch.session import MODEL
from narrows.errors import LowerError, UsageError
from narrows.files.folders import scratch

if TYPE_CHECKING:
    from narrows.backends.timing import Trial
    from narrows.backends.torch.eager import EagerTable
    from narrows.ir.program import Program

FORMS = ("export", "aot")

COMPILERS = ("g++", "clang++", "c++")

BATCHES = (1, 3)  # besides the example's: what was fixed by accident shows


@dataclass(frozen=True)
class TorchTarget(Target):
    """Lowers a program to a ``.pt2`` file.

    Attributes:
        form: ``export`` for an exported program, which torch loads anywhere and can train or
            compile; ``aot`` for a package that AOTInductor compiled for this machine, which needs a
            C++ compiler.
        check: Whether the file is held to the program.
        samples: How many inputs the check tries per batch size.
    """

    name: ClassVar[str] = "torch"
    summary: ClassVar[str] = "a .pt2 file: an exported program, or compiled by AOTInductor"
    measuring: ClassVar[str] = "narrows.backends.torch.costs"

    form: str = "export"
    check: bool = True
    samples: int = 2

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UsageError(f"torch takes the form {' or '.join(FORMS)}, got {self.form!r}")
        if self.samples < 1:
            raise UsageError(f"torch takes 1 sample or more, got {self.samples}")

    @classmethod
    def available(cls) -> str | None:
        """Return what is missing, or ``None``."""
        return None if importlib.util.find_spec("torch") else "it needs torch: pip install torch"

    @classmethod
    def variants(cls) -> list[Variant]:
        """Return one row per form."""
        missing = cls.available() or ""
        compiler = "" if find_compiler() else f"there is no C++ compiler ({', '.join(COMPILERS)})"
        checked = "run against the program, batches of 1, 2 and 3"
        return [
            Variant(
                "torch", "torch", missing, "any batch size; trains, compiles", checked, not missing,
                not missing,
            ),
            Variant(
                "torch{form=aot}", "torch, a C++ compiler", missing or compiler,
                "any batch size, this machine", checked, not (missing or compiler),
                not (missing or compiler),
            ),
        ]  # fmt: skip

    def costs(self) -> EagerTable | None:
        """Return the costs of eager code; what AOTInductor makes of a program, no table tells."""
        from narrows.backends.torch.costs import TABLES

        return TABLES.current() if self.form == "export" else None

    def track(self) -> AbstractContextManager[Track] | None:
        """Return where programs are timed in eager torch; see `Target.track`."""
        return nullcontext(_trial) if self.form == "export" else None

    def write(self, pair: Pair, plan_json: Any = None) -> Written:
        """Return the program as a torch artifact; see `Target.write`."""
        from narrows.backends.compare import Wanted, held_to
        from narrows.backends.leaves import Leaves, example_batch
        from narrows.backends.manifest import new_manifest

        if self.form == "aot" and not find_compiler():
            raise LowerError(
                "AOTInductor cannot compile the program",
                why=f"there is no C++ compiler: none of {', '.join(COMPILERS)}",
                hint="install one, or take torch{form=export}",
            )
        program = pair.lowered
        leaves = Leaves.of(program)
        inputs, outputs = leaves.specs(program)
        manifest = new_manifest(self, program, leaves, inputs, outputs, plan_json, ["torch"])
        folder = scratch()
        artifact = Artifact.owning(folder, manifest)  # from here on the folder goes with it
        _write(program, folder / MODEL, self.form)
        manifest["files"] = describe_files(folder, [MODEL])
        if not self.check:
            return Written(artifact)
        free = pair.reference.dynamic_batch
        batches = (*BATCHES, example_batch(pair.reference)) if free else (None,)
        wanted = Wanted.of(pair.reference, batches, self.samples)

        def complete(again: Callable[[], Pair]) -> None:
            manifest["fidelity"] = held_to(wanted, artifact)

        return Written(artifact, complete)


def _trial(program: Program, batch: int) -> Trial:
    """Return what times a program in eager torch, on one thread."""
    import torch

    from narrows.backends.leaves import Leaves
    from narrows.backends.timing import drawn, here

    leaves = Leaves.of(program)
    specs = ((s["name"], s["shape"], s["dtype"]) for s in leaves.specs(program)[0])
    arrays = [torch.from_numpy(a) for a in drawn(specs, batch).values()]
    flat = [arrays[i["tensor"]] if "tensor" in i else i["value"] for i in leaves.inputs]

    def run() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                program.run_flat(flat)
        finally:
            torch.set_num_threads(threads)

    return here(run)


def find_compiler() -> str:
    """Return the path of a C++ compiler, or an empty string."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), "")


def _write(program: Program, path: Path, form: str) -> None:
    """Write the program as a ``.pt2`` file."""
    import torch

    from narrows.ir.module import ProgramModule

    program = _in_plain_containers(program)
    module = ProgramModule(program, shared=True)
    args, kwargs = program.in_spec.unflatten(program.examples)
    if kwargs:
        _name_parameters(module, kwargs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                module, args, kwargs, dynamic_shapes=_free_axes(program), strict=False
            )
            if form == "export":
                torch.export.save(exported, path)
            else:
                logging.getLogger("torch._inductor").setLevel(logging.ERROR)
                torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    except Exception as error:  # the exporter and the compiler raise all kinds
        why = next((line for line in str(error).splitlines() if line.strip()), "")
        raise LowerError(
            f"torch cannot {'export' if form == 'export' else 'compile'} the program",
            why=f"{type(error).__name__}: {why}",
            hint="capture with dynamic_batch=False" if program.dynamic_batch else "",
        ) from error


def _in_plain_containers(program: Program) -> Program:
    """Return the program with flat inputs, or results, where classes of the user's hold them.

    A file that names such a class loads only where that class is; the manifest has the nesting.
    """
    from torch.utils import _pytree as pytree

    flat = pytree.tree_structure((tuple(program.examples), {}))
    results: Any = program.output.args[0]
    return program.replace(
        in_spec=program.in_spec if _is_plain(program.in_spec) else flat,
        out_spec=program.out_spec
        if _is_plain(program.out_spec)
        else pytree.tree_structure((0,) * len(results)),
    )


def _is_plain(spec: Any) -> bool:
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(map(_is_plain, spec.children()))


def _name_parameters(module: Any, names: Iterable[str]) -> None:
    """Spell out the ``**kwargs`` of a module's forward; the exporter cannot see through them."""
    call = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    positional = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
    forward.__signature__ = inspect.Signature([positional, *named])  # type: ignore[attr-defined]
    module.forward = forward


def _free_axes(program: Program) -> Any:
    """Return the axes that the exporter leaves free."""
    import torch

    from narrows.ir.meta import Meta

    if not program.dynamic_batch:
        return None
    batch = torch.export.Dim("batch")
    shapes = torch.export.ShapesCollection()
    for node, example in zip(program.placeholders, program.examples, strict=True):
        if isinstance(example, torch.Tensor) and Meta(node).dynamic:
            shapes[example] = dict.fromkeys(Meta(node).dynamic, batch)
    return shapes
