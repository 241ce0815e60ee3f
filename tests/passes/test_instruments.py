"""What watches a pipeline: checks of structure, promises and numbers, progress, dumps."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from narrows.errors import ArtifactError, FidelityError, PassError, ProgramError
from narrows.ir.dump import Dump
from narrows.ir.program import Program
from narrows.passes.base import Fidelity, Pass, PassResult, tolerance
from narrows.passes.eliminate_dead import EliminateDead
from narrows.passes.fold_batch_norm import FoldBatchNorm
from narrows.passes.instruments import Dumper, Progress, Promises, Verify, compare
from narrows.passes.pipeline import Pipeline
from narrows.passes.proof import Numerics
from tests.builder import Builder
from tests.passes.samples import Lossy, Options, Scale, network, plain


def run_with(pass_: Pass, *instruments: Any) -> PassResult:
    return Pipeline((pass_,)).run(plain(), instruments)


def test_verify_names_the_pass_that_broke_the_program():
    with pytest.raises(PassError, match="the program is broken after scale: "):
        run_with(Scale(how="break"), Verify())


def test_verify_tells_a_program_that_was_broken_before():
    program = plain().copy()
    program.weights.clear()
    with pytest.raises(PassError, match="the program is broken as it was given: "):
        Pipeline((Options(),)).run(program, [Verify()])


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (Scale(how="in-place"), "scale changed the weights of its input"),
        (Scale(says=False), "scale changed the program but says changed=False"),
        (Scale(how="nothing"), "scale left the program as it was but says changed=True"),
    ],
)
def test_promises_catches_a_pass_that_breaks_them(pass_: Pass, message: str):
    with pytest.raises(PassError, match=message):
        run_with(pass_, Promises())


def test_a_pass_cannot_edit_its_input():
    with pytest.raises(ProgramError, match="a finished program is not changed"):
        run_with(Scale(how="same"))


def test_promises_lets_an_honest_pass_through():
    assert run_with(Scale(), Promises()).reports[0].changed
    assert not run_with(Scale(how="nothing", says=False), Promises()).reports[0].changed


def test_numerics_refuses_a_wrong_result():
    with pytest.raises(FidelityError) as caught:
        run_with(Scale(by=1.01), Numerics())
    assert "it differs by 0.01 (relative, float64)" in caught.value.what
    assert caught.value.where.startswith("scale, from conv")
    assert "1e-12 at most" in caught.value.why


def test_numerics_records_what_a_lossy_pass_does():
    numerics = Numerics()
    (report,) = run_with(Lossy(by=3.0), numerics).reports
    assert report.fidelity == pytest.approx(2.0)
    assert numerics.errors == [("lossy{by=3.0}", {"float32": report.fidelity})]


def test_numerics_lets_float64_judge_rounding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "narrows.passes.proof.tolerance",
        lambda fidelity, dtype: 0.0 if dtype is torch.float32 else 1e-12,
    )
    b = Builder((2, 2, 4, 4))
    program = b.program(b.norm(b.conv(b.inputs[0], "conv", 4, 2, bias=True), "norm", 4))
    program.weights["norm.running_var"].add_(0.1)
    (report,) = Pipeline((FoldBatchNorm(),)).run(program, [Numerics()]).reports
    assert report.measured["float32"] > 0
    assert report.measured["float64"] <= 1e-12


@dataclass(frozen=True)
class Coarse(Pass):
    """Is exact in float64 alone."""

    name: ClassVar[str] = "coarse"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        name, tensor = next(iter(program.weights.items()))
        by = 1.01 if tensor.dtype is torch.float32 else 1.0
        return PassResult(program.replace(weights={**program.weights, name: tensor * by}), True)


def test_numerics_excuses_no_more_than_rounding_can_do():
    with pytest.raises(FidelityError, match=r"differs by 0.01 \(relative, float32\)"):
        run_with(Coarse(), Numerics())


def test_numerics_looks_at_a_small_channel_by_its_own_size():
    """The channels differ by 1e5: what is wrong with the small one is lost beside the large."""
    program = plain()
    wide = program.weights["conv.weight"].clone()
    wide[1:] *= 1e5
    program = program.replace(weights={**program.weights, "conv.weight": wide})
    with pytest.raises(FidelityError):
        Pipeline((First(),)).run(program, [Numerics()])


@dataclass(frozen=True)
class First(Pass):
    """Changes the first output channel of the first weight."""

    name: ClassVar[str] = "first"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        name, tensor = next(iter(program.weights.items()))
        changed = tensor.clone()
        changed[0] *= 1.01
        return PassResult(program.replace(weights={**program.weights, name: changed}), True)


def test_numerics_runs_float64_when_asked():
    (report,) = run_with(Options(), Numerics(double=True)).reports
    assert report.measured == {"float32": 0.0, "float64": 0.0}


def test_the_comparison_finds_a_wrong_tensor():
    program = plain()
    wrong = program.copy()
    wrong.weights["conv.weight"] = wrong.weights["conv.weight"] + 1e-3
    assert compare(wrong, program) > tolerance(Fidelity.EXACT, torch.float32)


@pytest.mark.parametrize(
    ("fidelity", "dtype", "expected"),
    [
        (Fidelity.EXACT, torch.float64, 1e-12),
        (Fidelity.EXACT, torch.int32, 0.0),
        (Fidelity.LOSSY, torch.float32, float("inf")),
    ],
)
def test_tolerances(fidelity: Fidelity, dtype: torch.dtype, expected: float):
    assert tolerance(fidelity, dtype) == expected


def test_progress_is_silent_off_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    quiet, loud = io.StringIO(), Terminal()
    run_with(Options(), Numerics(), Progress(quiet), Progress(loud))
    with pytest.raises(RuntimeError):
        run_with(Scale(how="raise"), Progress(loud))
    assert quiet.getvalue() == ""
    assert "options ..." in loud.getvalue()
    assert "options: nothing to do in" in loud.getvalue()
    assert "float32 error 0.0e+00" in loud.getvalue()
    assert loud.getvalue().endswith("scale: failed\n")


# ------------------------------------------------------------------ dumps


def test_a_dump_holds_the_program_after_every_pass(tmp_path: Path):
    folder = tmp_path / "dump"
    pipeline = Pipeline((FoldBatchNorm(), EliminateDead()))
    result = pipeline.run(network(), [Numerics(), Dumper(folder)])
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        "000_capture.json",
        "000_capture.txt",
        "001_fold-batch-norm.json",
        "001_fold-batch-norm.txt",
        "002_eliminate-dead.json",
        "002_eliminate-dead.txt",
        "index.json",
    ]
    dump = Dump.open(folder)
    assert dump.program == "net"
    assert [s["nodes"] for s in dump.stages] == [6, 5, 4]
    assert dump.stages[1]["measured"] == result.reports[0].measured
    assert dump.snapshot().history == ("fold-batch-norm", "eliminate-dead")
    assert [c["name"] for c in dump.couplings]


def test_a_failing_pass_leaves_the_dump_up_to_it_with_the_error(tmp_path: Path):
    with pytest.raises(FidelityError):
        Pipeline((FoldBatchNorm(), Scale())).run(network(), [Numerics(), Dumper(tmp_path / "d")])
    stages = Dump.open(tmp_path / "d").stages
    assert [s["name"] for s in stages] == ["capture", "fold-batch-norm", "scale"]
    assert stages[-1]["error"].startswith("output 0 (")
    # The refused program is there, to be compared with the one before it.
    assert Dump.open(tmp_path / "d").snapshot().history == ("fold-batch-norm", "scale")


def test_a_pass_that_raises_is_in_the_dump_without_a_program(tmp_path: Path):
    with pytest.raises(RuntimeError):
        Pipeline((Options(), Scale(how="raise"))).run(plain(), [Dumper(tmp_path / "d")])
    dump = Dump.open(tmp_path / "d")
    assert dump.stages[-1] == {"name": "scale", "file": None, "error": "broken"}
    assert dump.snapshot().history == ("options",)


def test_an_interrupted_pipeline_leaves_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(self: Pass, program: Program) -> PassResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(Scale, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Pipeline((Options(), Scale())).run(plain(), [Dumper(tmp_path / "d")])
    dump = Dump.open(tmp_path / "d")
    assert [s["name"] for s in dump.stages] == ["capture", "options"]
    assert dump.snapshot().history == ("options",)


def test_a_dump_replaces_an_older_dump(tmp_path: Path):
    run_with(Options(), Dumper(tmp_path / "d"))
    Pipeline((FoldBatchNorm(),)).run(network(), [Dumper(tmp_path / "d")])
    assert [s["name"] for s in Dump.open(tmp_path / "d").stages] == ["capture", "fold-batch-norm"]


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_foreign(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def make_mixed(path: Path) -> None:
    Dump.create(path)
    (path / "notes.txt").write_text("mine")


def make_foreign_index(path: Path) -> None:
    path.mkdir()
    (path / "index.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_file, "a file is in the way"),
        (make_foreign, "holds files that narrows did not write"),
        (make_mixed, "holds notes.txt, which narrows did not write"),
        (make_foreign_index, "this index was not written by narrows"),
    ],
)
def test_a_foreign_folder_is_refused_and_stays(
    tmp_path: Path, make: Callable[[Path], None], message: str
):
    make(tmp_path / "d")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=message):
        Dumper(tmp_path / "d")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_dump_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write the dump"):
        Dumper(tmp_path / "file" / "dump")
