"""What becomes of one network: every claim of narrows about it, tried, and a verdict for each.

The claims: the captured program equals the module; the masked program equals the module whose
columns and rows are zeroed by hand; what `narrows.apply` makes equals the masked program, for every
target's costs; the integer program is the same numbers in ONNX Runtime and in C.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import narrows
from benchmarks.fuzz.graphs import FORMS, Graph, Mask
from narrows.backends.integers import float_islands
from narrows.errors import FidelityError, NarrowsError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from tests.networks.reference import masked_module

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]

RIGHT, WRONG, CAUGHT, RAW, REFUSED, OUTSIDE = (
    "right", "wrong", "caught", "raw", "refused", "outside",
)  # fmt: skip
# A refusal that asks for a report is a mistake that narrows found in itself.
OWN_FAULT = "report this"


@dataclass(frozen=True)
class Finding:
    """A verdict on one claim.

    Attributes:
        verdict: ``right``; ``wrong``: other numbers; ``caught``: other numbers, or no program, as
            narrows' own checks say; ``raw``: an exception that is not of its family; ``refused``:
            an error with a reason; ``outside``: nothing was promised.
        stage: What was claimed: ``capture``, ``plan``, ``oracle``, a form, ``quantize``, ``ort``,
            ``c``.
        mask: How the plan was made.
        text: The error, or by how much it is wrong.
    """

    verdict: str
    stage: str
    mask: Mask
    text: str = ""

    @property
    def reason(self) -> str:
        """The text without what differs from network to network, to count by."""
        text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", self.text)
        return re.sub(r"\d[\d.,e+-]*", "N", text)


def judge(graph: Graph, masks: Sequence[Mask], forms: Sequence[str] = FORMS) -> Iterator[Finding]:
    """Yield a finding for each claim about a network, as soon as it is known."""
    claims = Claims(graph)
    nothing = masks[0]
    made = claims.attempt("capture", nothing, claims.capture)
    yield from claims.flush()
    if made is None:
        return
    for mask in masks:
        plan = claims.attempt("plan", mask, lambda mask=mask: _planned(mask, claims.program))
        yield from claims.flush()
        if plan is None:
            continue
        masked = claims.attempt("oracle", mask, lambda p=plan: claims.oracle(p))
        yield from claims.flush()
        for form in forms if masked is not None else ():
            claims.attempt(form, mask, lambda f=form, p=plan, m=masked: claims.form(f, p, m))
            yield from claims.flush()
    if graph.quantized:
        yield from claims.integers(masks[-1])


def _planned(mask: Mask, program: Program) -> Any:
    plan = mask.plan(program)
    return narrows.ChannelPlan() if plan is None else plan


class Claims:
    """The claims about one network; `attempt` turns what they raise into findings."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.found = graph, list[Finding]()
        self.program: Any = None
        self.module: Any = None

    def flush(self) -> list[Finding]:
        """Return the findings since the last time."""
        found, self.found = self.found, []
        return found

    def attempt(self, stage: str, mask: Mask, claim: Callable[[], Any]) -> Any:
        """Return what a claim makes, ``None`` where it fails; either is a finding."""
        try:
            made = claim()
        except DiffersError as wrong:
            verdict, text = WRONG, str(wrong)
        except NarrowsError as error:
            verdict = CAUGHT if found_by_itself(error) else REFUSED
            text = f"{type(error).__name__}: {error.what}"
        except Exception as error:
            verdict, text = RAW, _raw(error)
        else:
            self.found.append(Finding(RIGHT, stage, mask))
            return made
        self.found.append(Finding(verdict, stage, mask, text))
        return None

    def capture(self) -> bool:
        """Hold the captured program to the module."""
        self.module = self.graph.build()
        self.program = narrows.capture(self.module, (self.graph.images(2, 0),))
        with torch.no_grad():
            for batch in self.batches():
                agree(self.program(batch), self.module(batch))
        return True

    def batches(self) -> list[torch.Tensor]:
        """Return inputs that nothing has seen, of two batch sizes where the program takes them."""
        sizes = (2, 3) if self.program.dynamic_batch else (2,)
        return [self.graph.images(size, 100 + size) for size in sizes]

    def oracle(self, plan: Any) -> Program:
        """Hold the masked program to the module that is zeroed by hand, and return it."""
        masked = plan.masked(self.program)
        example = (self.graph.images(2, 0),)
        reference = masked_module(self.module, plan.inputs, plan.outputs, example)
        with torch.no_grad():
            for batch in self.batches():
                agree(masked(batch), reference(batch))
        return masked

    def form(self, form: str, plan: Any, masked: Program) -> bool:
        """Hold what `narrows.apply` makes to the masked program."""
        target = None if form == "none" else form
        result = narrows.apply(self.program, plan, target=target)
        verify(result)
        for batch in self.batches():
            agree(result(batch), masked(batch))
        return True

    def integers(self, mask: Mask) -> Iterator[Finding]:
        """Yield findings on the pruned program in integers: in ONNX Runtime, and in C."""
        quantized = self.attempt("quantize", mask, lambda: self.quantized(mask))
        yield from self.flush()
        if quantized is None:
            return
        form = ("qdq", "qlinear", "integer")[self.graph.seed % 3]
        program = quantized.program
        # Where floats stay, `lower` alone can compare, so it does on inputs of its own, too.
        samples = 3 if float_islands(program) else 1
        self.attempt("ort", mask, lambda: self.same_bits(program, "onnx", form=form,
                                                         samples=samples))  # fmt: skip
        yield from self.flush()
        if quantized.plan.floats:  # no promise is made of what is not all integers
            text = f"stay floating-point: {', '.join(quantized.plan.floats)}"
            yield Finding(OUTSIDE, "c", mask, text)
            return
        self.attempt("c", mask, lambda: self.same_bits(program, "c", check=False))
        yield from self.flush()

    def quantized(self, mask: Mask) -> narrows.Quantized:
        """Return the pruned program in integers."""
        module = self.graph.build().float()
        program = narrows.capture(module, (self.graph.images(2, 0).float(),))
        pruned = narrows.apply(program, _planned(mask, program))
        bits = (8, 8, 4, 6)[self.graph.seed % 4]
        data = [self.graph.images(4).float()]
        return narrows.quantize(
            pruned, data, weights=bits, activations=max(bits, 6), allow_lost=True
        )

    def same_bits(self, program: Program, target: str, **options: Any) -> bool:
        """Hold an artifact to the integer program, bit for bit."""
        artifact = narrows.lower(program, target, **options)
        if float_islands(program):
            # Floats of two runtimes may lie on either side of a tie. `lower` has held what follows
            # them to what the artifact's own islands give.
            return True
        batch = 1 if target == "c" else 2
        for seed in (11, 12):
            images = self.graph.images(batch, seed).float()
            found = artifact.run_flat([images])
            wanted = program.run_flat([images])
            for got, want in zip(found, wanted, strict=True):
                if not torch.equal(torch.from_numpy(got), want):
                    raise DiffersError("some outputs are not the integer program's")
        return True


class DiffersError(Exception):
    """Two results that had to be equal are not."""


def agree(actual: Any, wanted: Any) -> None:
    """Raise `DiffersError` unless two results are equal but for rounding."""
    error = relative_error(actual, wanted)
    if not error <= EXACT:
        raise DiffersError(f"wrong by {error:.2g}")


def found_by_itself(error: NarrowsError) -> bool:
    """Whether an error says that narrows is wrong, not that it was asked for too much."""
    return isinstance(error, FidelityError) or OWN_FAULT in error.hint


def _raw(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"{Path(narrows.__file__).parent}" in f.filename]
    at = f" in {Path(own[-1].filename).name}:{own[-1].name}" if own else ""
    said = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {said[:160]}{at}"
