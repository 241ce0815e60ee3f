"""What `apply` proves: one comparison with the masked program, and what it says when that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import FidelityError, PassError
from narrows.ir.program import Draft, Program
from narrows.passes import instruments, proof
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.fold_batch_norm import FoldBatchNorm
from narrows.passes.instruments import Dumper
from narrows.passes.pipeline import Pipeline, PipelineResult
from narrows.passes.proof import Proof, Unproven, first_difference
from tests.builder import Builder, aten
from tests.passes.samples import Lossy, Options, Scale, network, plain


def proven(program: Program, *passes: Pass) -> PipelineResult:
    return Pipeline(passes).run(program, [Proof(len(passes))])


@dataclass(frozen=True)
class Means(Scale):
    """Doubles the first weight, and says that this is what it is for."""

    name: ClassVar[str] = "means"

    def reference(self, program: Program) -> Program:
        return super().run(program).program


@dataclass(frozen=True)
class Change(Pass):
    """Changes a copy of the program by a function."""

    name: ClassVar[str] = "change"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    by: Callable[[Draft], None] = print

    def run(self, program: Program) -> PassResult:
        result = program.copy()
        self.by(result)
        return PassResult(result, True)


def regroup(program: Program) -> None:
    conv = program.node("conv")
    conv.args = (*conv.args[:6], 2)


# ------------------------------------------------------------------ what is compared


def test_two_runs_prove_a_whole_pipeline(monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    run = instruments.outputs_of

    def counted(program: Program, inputs: Any) -> list[Any]:
        ran.append(program.name)
        return run(program, inputs)

    monkeypatch.setattr(proof, "outputs_of", counted)
    program = network()
    result = proven(program, FoldBatchNorm(), Options())
    assert len(ran) == 2
    assert result.reports[0].measured == {}
    assert result.reports[1].measured["float32"] <= 1e-5
    assert result.notes == ()


def test_a_wrong_result_names_output_pass_and_node():
    with pytest.raises(FidelityError) as caught:
        proven(plain(), Options(), Scale(by=1.01))
    assert caught.value.what == (
        "output 0 (conv) is not that of the program before the passes: "
        "it differs by 0.01 (relative, float64)"
    )
    assert caught.value.where == "scale, from conv (net.py:1  y = self.conv(x)) on"
    assert caught.value.why == "rounding explains 1e-12 at most"
    assert "check=False" in caught.value.hint


def test_apply_without_a_plan_compares_with_the_program_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FoldBatchNorm, "run", lambda self, p: Scale().run(p))
    with pytest.raises(FidelityError, match="not that of the program before the passes"):
        narrows.apply(network(), pipeline="fold-batch-norm")


def test_a_pass_with_a_reference_of_its_own_begins_anew():
    result = proven(plain(), Options(), Means(), Options())
    assert [set(r.measured) for r in result.reports] == [set(), {"float32"}, {"float32"}]
    with pytest.raises(FidelityError, match=r"(?s)not that of .*at scale"):
        proven(plain(), Scale(), Means())


def test_a_lossy_pass_is_left_out():
    result = proven(plain(), Options(), Lossy(by=3.0))
    assert result.reports[1].measured == {"float32": 0.0}  # of what came before it
    with pytest.raises(FidelityError, match="at scale"):
        proven(plain(), Lossy(by=3.0), Scale())


def test_a_broken_program_and_one_that_does_not_run_are_refused():
    with pytest.raises(PassError, match="the program is broken after the passes"):
        proven(plain(), Scale(how="break"))
    with pytest.raises(PassError, match="net does not run on its examples") as caught:
        proven(plain(), Change(regroup))
    assert caught.value.where == "conv (net.py:1  y = self.conv(x))"


# ------------------------------------------------------------------ rounding, or a mistake


def test_float64_judges_what_float32_cannot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proof, "tolerance", lambda f, d: 1e-12 if d is torch.float64 else 0.0)
    b = Builder((2, 2, 4, 4))
    program = b.program(b.norm(b.conv(b.inputs[0], "conv", 4, 2, bias=True), "norm", 4))
    program.weights["norm.running_var"].add_(0.1)
    (report,) = proven(program, FoldBatchNorm()).reports
    assert report.measured["float32"] > 0
    assert report.measured["float64"] <= 1e-12
    (note,) = report.notes
    assert note.reason == "rounding"
    assert "exact in float64" in note.message


def test_a_rounded_weight_is_judged_by_the_precision_it_has(monkeypatch: pytest.MonkeyPatch):
    """Wrong by the comparison in float32, right by one in float64 of the same program."""
    errors_of = proof.errors_of

    def noisy(actual: Any, wanted: Any) -> list[float]:
        return [1.0] if wanted[0].dtype is torch.float32 else errors_of(actual, wanted)

    monkeypatch.setattr(proof, "errors_of", noisy)
    program = network()
    program.weights["norm.running_var"].add_(0.1)
    (report,) = proven(program, FoldBatchNorm()).reports
    assert report.measured["float32"] == 1.0
    assert 1e-12 < report.measured["float64"] <= 1e-5
    assert report.notes == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_programs_are_compared(dtype: torch.dtype):
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    program = narrows.capture(layers.eval().to(dtype), (torch.randn(2, 3, 8, 8, dtype=dtype),))
    assert "unchecked" not in {n.reason for n in narrows.apply(program, pipeline=FOLD).notes}
    with pytest.raises(FidelityError, match="relative, float64"):
        proven(program, FoldBatchNorm(), Scale())


FOLD = "fold-batch-norm"


def test_a_dtype_that_does_not_run_here_is_compared_in_float64(monkeypatch: pytest.MonkeyPatch):
    run = instruments.outputs_of

    def lacking(program: Program, inputs: Any) -> list[Any]:
        if inputs[0].dtype is torch.float16:
            raise PassError("no kernel")
        return run(program, inputs)

    monkeypatch.setattr(proof, "outputs_of", lacking)
    program = plain().to(torch.float16)
    (report,) = proven(program, Options()).reports
    assert report.measured == {"float64": 0.0}


def test_a_program_that_runs_in_no_precision_cannot_be_compared(monkeypatch: pytest.MonkeyPatch):
    def lacking(program: Program, inputs: Any) -> list[Any]:
        raise PassError("no kernel")

    monkeypatch.setattr(proof, "outputs_of", lacking)
    with pytest.raises(PassError, match="no kernel"):
        proven(plain(), Options())


# ------------------------------------------------------------------ what a comparison cannot see


class Logarithm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).log()


def test_outputs_that_are_not_finite_are_said():
    program = narrows.capture(Logarithm().eval(), (torch.randn(4, 4),))
    result = narrows.apply(program, {"ratio": 0.5})
    (note,) = [n for n in result.notes if n.reason == "not finite"]
    assert "NaN or infinity" in note.message
    assert "output 0 (log) (float64)" in note.message


def test_a_nan_for_a_number_is_wrong_in_any_precision(monkeypatch: pytest.MonkeyPatch):
    def spoil(program: Draft) -> None:
        program.weights["conv.weight"] = program.weights["conv.weight"] * torch.nan

    with pytest.raises(FidelityError, match=r"differs by inf \(relative, float32\)"):
        proven(plain(), Change(spoil))


def test_overflow_of_a_half_type_is_seen_in_float64():
    program = plain().to(torch.float16)
    program = program.copy()
    program.weights["conv.weight"] = program.weights["conv.weight"] * 60000
    (report,) = proven(program, Options()).reports
    assert report.measured == {"float16": 0.0, "float64": 0.0}
    assert report.notes == ()
    with pytest.raises(FidelityError):
        proven(program, Scale(by=0.5))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(10, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(self.embed(ids))
        return y.argmax(-1), y > 0


def test_whole_numbers_are_equal_or_wrong():
    program = narrows.capture(Tokens().eval(), (torch.randint(0, 10, (2, 6)),))
    assert "unchecked" not in {n.reason for n in narrows.apply(program, {"ratio": 0.5}).notes}
    with pytest.raises(FidelityError, match=r"output [01] "):
        proven(program, Scale(by=-1.0))


# ------------------------------------------------------------------ where it begins


def test_a_lost_channel_is_found_at_the_node_that_mixes_it_up():
    b = Builder((2, 2, 4, 4))
    program = b.program(b.relu(b.conv(b.inputs[0], "conv", 4, 2)))

    def part(channels: list[int], factor: float = 1.0) -> Program:
        made = program.copy()
        made.weights["conv.weight"] = made.weights["conv.weight"][channels] * factor
        return made

    assert first_difference(part([3, 1]), program, 1e-5) == ""
    assert first_difference(part([3, 1], 1.5), program, 1e-5).startswith("conv (net.py:1")


def test_nodes_of_another_rank_are_passed_over():
    def flat(shape: list[int]) -> Program:
        b = Builder((2, 4, 4))
        x = b.call(aten.reshape.default, b.inputs[0], shape, name="moved")
        return b.program(b.call(aten.mul.Tensor, x, 2, name="twice"))

    assert first_difference(flat([2, 16]), flat([2, 4, 4]), 1e-5) == ""
    assert first_difference(flat([4, 2, 4]), flat([2, 4, 4]), 1e-5) == ""


# ------------------------------------------------------------------ without a check


def test_a_program_that_was_not_checked_says_so(tmp_path: Path):
    program = network()
    watched = narrows.apply(program, check=False, instruments=[Dumper(tmp_path / "dump")])
    assert [n.reason for n in watched.notes if n.reason == "unchecked"] == ["unchecked"]
    assert "unchecked" in str(watched)
    last = sorted((tmp_path / "dump").glob("*.txt"))[-1]
    assert "nobody compared this program with the masked one" in last.read_text(encoding="utf-8")
    assert "nobody compared this program" in narrows.lower(watched, samples=1).report
    assert "unchecked" not in str(narrows.apply(program))


def test_an_unproven_pipeline_says_it_once():
    notes = Pipeline((Options(), Options())).run(plain(), [Unproven(2)]).notes
    assert [n.reason for n in notes] == ["unchecked"]


def test_a_dump_of_a_refused_program_holds_the_error(tmp_path: Path):
    watches = [Proof(1), Dumper(tmp_path / "dump")]
    with pytest.raises(FidelityError):
        Pipeline((Scale(),)).run(plain(), watches)
    assert "is not that of" in (tmp_path / "dump" / "index.json").read_text(encoding="utf-8")


class Boxes(nn.Module):
    """Boxes up to 640 beside scores near a hundredth."""

    def __init__(self) -> None:
        super().__init__()
        self.box, self.score = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
        nn.init.constant_(self.score.bias, -5.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.box(x).sigmoid() * 640, self.score(x).sigmoid()], 1)


@dataclass(frozen=True)
class Swap(Pass):
    """Swaps two channels of a weight."""

    name: ClassVar[str] = "swap"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    weight: str = ""

    def run(self, program: Program) -> PassResult:
        tensor = program.weights[self.weight]
        swapped = torch.cat([tensor[[1, 0]], tensor[2:]])
        return PassResult(program.replace(weights={**program.weights, self.weight: swapped}), True)


def test_small_channels_are_not_hidden_by_large_ones():
    torch.manual_seed(0)
    program = narrows.capture(Boxes().eval(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(FidelityError, match="relative, float64"):
        proven(program, Swap("score.weight"))
    assert proven(program, Swap("score.weight"), Swap("score.weight")).reports[-1].notes == ()


def test_a_channel_of_next_to_nothing_is_judged_by_the_largest():
    wanted = torch.tensor([[1.0, 1e-3, 1e-9]]).double().repeat(2, 1)
    for channel, off, apart in ((1, 2e-6, True), (2, 2e-9, True), (2, 5e-10, False)):
        actual = wanted.clone()
        actual[0, channel] += off
        assert proof._apart((actual,), (wanted,)) == apart


def test_whole_numbers_are_equal_however_large():
    net = nn.Sequential(nn.Linear(4, 120_000)).eval()
    program = narrows.capture(Last(net), (torch.randn(2, 4),))
    with pytest.raises(FidelityError):
        proven(program, Swap("net.0.bias"), Roll())


class Last(nn.Module):
    """Which of many numbers is the largest."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(-1)


@dataclass(frozen=True)
class Roll(Pass):
    """Moves all channels on by one."""

    name: ClassVar[str] = "roll"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        weights = {n: t.roll(1, 0) for n, t in program.weights.items()}
        return PassResult(program.replace(weights=weights), True)


@dataclass(frozen=True)
class InFloat32(Pass):
    """Is wrong in float32 alone."""

    name: ClassVar[str] = "in-float32"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        weights = {n: t * (1.5 if t.dtype is torch.float32 else 1)
                   for n, t in program.weights.items()}  # fmt: skip
        return PassResult(program.replace(weights=weights), True)


def test_what_is_too_large_to_be_rounding_is_none():
    program = narrows.capture(nn.Conv2d(3, 4, 3).eval(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(FidelityError, match="relative, float32"):
        proven(program, InFloat32())


def test_a_weight_that_its_precision_does_not_hold_is_told():
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.n.running_mean.fill_(-1000.0)
            nn.init.constant_(self.n.weight, 100.0)
            nn.init.constant_(self.a.weight, -1 / 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.n(self.a(x)))

    torch.manual_seed(0)
    x = (1000 + 5 * torch.randn(2, 3, 4, 4)).half()
    program = narrows.capture(Far().half().eval(), (x,))
    with pytest.raises(FidelityError, match="that float16 does not hold"):
        narrows.apply(program, pipeline=FOLD)


def test_examples_that_give_zeros_alone_are_told():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)
    )
    program = narrows.capture(layers.eval(), (torch.zeros(2, 3, 8, 8),))
    assert "all zero" in {n.reason for n in narrows.apply(program).notes}
