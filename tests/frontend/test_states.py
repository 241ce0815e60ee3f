"""States that a user declares: which input and which output they are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import CaptureError

H = torch.ones(2, 4)


class Net(nn.Module):
    """Adds a layer of its input to its states, and returns them in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, state: tuple[Tensor, tuple[Tensor, Tensor]]) -> dict[str, Any]:
        h, (c, d) = state
        h, c, d = h + self.a(x), c * 0.5 + self.a(x), d - self.a(x)
        y = self.b(h + c + d)
        return {"y": y, "state": (h, (c, d)), "int": (h * 0).int(), "flat": h.flatten(), "one": x}


def captured(state: Any) -> narrows.Program:
    return narrows.capture(Net().eval(), (torch.ones(2, 3), (H, (H, H))), state=state)


@pytest.mark.parametrize(
    "state",
    [
        {"state": "state"},
        {"state": ("state",)},
        {"state_0": ["state", 0], "state_1_0": ("state", 1, 0), "state_1_1": ("state", 1, 1)},
        {"state_0": 1, "state_1_0": 2, "state_1_1": 3},  # of results by name, the flat position
    ],
)
def test_an_argument_is_as_many_states_as_it_holds_tensors(state: Any) -> None:
    program = captured(state)
    assert [(s.name, s.output) for s in program.states] == [
        ("state_0", 1), ("state_1_0", 2), ("state_1_1", 3)
    ]  # fmt: skip
    assert all(s.axes == (1,) and s.whole == s.sizes == (4,) for s in program.states)
    assert "state of output 3" in str(program)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"stat": 1}, "names the input 'stat', which there is not.*did you mean 'state'"),
        ({"state": "stat"}, "gives the input 'state' output 'stat', which there is not"),
        ({"state_0": 9}, r"output 9, which there is not.*the 7 outputs are 'y', \['state', 0\]"),
        ({"state_0": ("state", 2)}, r"output \['state', 2\], which there is not"),
        ({"state": "y"}, "holds 3 tensors, output 'y' 1"),
        ({"state_0": 1, "state_1_0": 1}, "names output 1 twice"),
        ({"state_0": 1, "state": "state"}, "names input 'state_0' twice"),
        ({"state_0": "y"}, r"no one state.*\[2, 4\] goes in, \[2, 2\] comes out"),
        ({"state_0": "flat"}, r"\[2, 4\] goes in, \[8\] comes out"),
        ({"state_0": "int"}, "torch.float32 goes in, torch.int32 comes out"),
        (["state"], "takes a dict"),
    ],
)
def test_a_wrong_declaration_says_what_is_wrong(state: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=f"(?s){message}"):
        captured(state)


class Grows(nn.Module):
    """Returns a longer tensor: joined along an axis, or not joined at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(3, 4), how

    def forward(self, x: Tensor, h: Tensor) -> Any:
        if self.how == "repeated":
            return h.repeat(1, 2, 1) + self.a(x)[:, None]
        new = self.a(x)[:, None]
        return torch.cat((h, new), 1) if self.how == "tokens" else torch.cat((h, new), 2)


def grown(how: str) -> narrows.Program:
    sizes = (2, 1, 4) if how == "channels" else (2, 5, 4)
    return narrows.capture(Grows(how).eval(), (torch.ones(2, 3), torch.ones(sizes)), state={"h": 0})


def test_a_state_may_grow_where_what_is_new_is_joined() -> None:
    assert grown("tokens").states[0].axes == (2,)
    with pytest.raises(CaptureError, match=r"(?s)no one state.*one axis may grow"):
        grown("repeated")
    with pytest.raises(CaptureError, match="lie along axis 2, which is not of one size"):
        grown("channels")


def test_a_state_behind_a_barrier_has_no_channels_to_name() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(3, 4)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return self.cell(x, (h, c))

    inputs = torch.ones(5, 2, 3), torch.ones(1, 2, 4), torch.ones(1, 2, 4)
    with pytest.raises(CaptureError, match=r"(?s)nothing tells .* 'h' lie.*lstm\.input has no row"):
        narrows.capture(
            Cell().eval(), inputs, dynamic_batch=False, state={"h": (1, 0), "c": (1, 1)}
        )


def test_an_exported_program_has_states_too() -> None:
    inputs = torch.ones(2, 3), torch.ones(2, 5, 4)
    exported = torch.export.export(Grows("tokens").eval(), inputs)
    program = narrows.capture(exported, state={"h": 0})
    assert program.state("h").output == 0
    with pytest.raises(narrows.NarrowsError, match="has no state 'x'"):
        program.state("x")
