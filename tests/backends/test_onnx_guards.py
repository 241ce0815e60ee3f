"""What the ONNX target refuses or leaves alone, guard by guard, each with what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import narrows
from narrows.backends.onnx import OnnxTarget, export, modelfile, rounding, simplify, target, tidy
from narrows.backends.onnx.blocks import Packed
from narrows.backends.onnx.check import first_difference
from narrows.backends.onnx.integer.lower import lower as lower_integers
from narrows.backends.onnx.modelfile import outline
from narrows.backends.onnx.session import OnnxSession, open_session
from narrows.errors import ArtifactError, LowerError, UsageError
from narrows.ir.program import Program
from tests.builder import Builder, aten

X = torch.linspace(-1, 1, 48).reshape(2, 4, 6)


class Net(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def integers(forward: Callable[[Tensor], Any], **options: Any) -> Program:
    program = narrows.capture(Net(forward).eval(), (X,), **options)
    return narrows.quantize(program, [X], method="minmax").program


# ------------------------------------------------------------------ integer programs


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: x.relu().flip(0), "flip.default has no ONNX form here"),
        (lambda x: x.relu().roll(1, 0), "roll.default has no ONNX form here"),
        (lambda x: x.relu().roll(1), "roll.default has no ONNX form here"),
        (lambda x: x.relu().repeat_interleave(2, 0), "repeat_interleave has no ONNX form here"),
        (lambda x: x.relu().repeat_interleave(2), "repeat_interleave has no ONNX form here"),
        (lambda x: (x.flatten(1) @ x.flatten(1).T).unsqueeze(0), "has 2 free axes"),
    ],
)
def test_what_moves_the_batch_has_no_integer_form(
    forward: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(LowerError, match=message):
        narrows.lower(integers(forward), samples=1)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.relu()[:, : x.shape[0]],
        lambda x: x.relu().repeat(1, 2, 3),
        lambda x: x.relu().flatten(1).repeat(3, 1, 2),
        lambda x: x.relu().flip(1, -1).roll(2, -1),
        lambda x: x.relu().repeat_interleave(2, -1),
        lambda x: x.relu()[:, 1:-1:2].select(-1, -2).unsqueeze(1).expand(-1, 3, 1),
        lambda x: [part.flip(2) for part in x.relu().split([1, 3], 1)],
        lambda x: (x.relu(), x.relu().clone(), F.dropout(x.relu(), 0.5, False)),
        lambda x: x.relu().unsqueeze(0).expand(3, -1, 4, 6)[1],
        lambda x: F.max_pool2d(x.relu().unsqueeze(1), [2, 3], [1, 2], [1, 0], 1, True),
        lambda x: F.max_pool2d(x.relu(), [2, 3], [1, 2], [1, 0], 1, True),  # channels lie first
        lambda x: x.relu().amax((1, -1), True) - x.amin(2, True),
    ],
)
def test_moves_are_exact(forward: Callable[[Tensor], Any]) -> None:
    narrows.lower(integers(forward), samples=1)  # compares, with ==


def test_a_form_that_is_none_is_refused() -> None:
    program = integers(lambda x: x.relu())
    with pytest.raises(UsageError, match="form is qdq, qlinear, integer, got 'best'"):
        lower_integers(program, [program.output], "best", 20)


def test_inputs_in_float64_become_codes() -> None:
    made = narrows.quantize(
        narrows.capture(Net(lambda x: x.relu()).eval(), (X.double(),)), [X.double()]
    ).program
    artifact = narrows.lower(made, samples=1)
    assert artifact.inputs[0].dtype == "float64"
    assert np.array_equal(artifact.run(X.double()), made(X.double()).numpy())


# ------------------------------------------------------------------ spellings


SPELLED: dict[str, Callable[[Builder], Any]] = {
    "adaptive average": lambda b: b.call(aten.adaptive_avg_pool2d.default, b.inputs[0], [4, 6]),
    "average of parts": lambda b: b.call(aten.adaptive_avg_pool2d.default, b.inputs[0], [2, 2]),
    "rrelu": lambda b: b.call(aten.rrelu.default, b.inputs[0], 0.1, 0.5),
    "dropout": lambda b: b.call(aten.dropout.default, b.inputs[0], 0.5, False),
    "channels dropped": lambda b: b.call(aten.feature_dropout.default, b.inputs[0], 0.5, False),
}


@pytest.mark.parametrize("name", SPELLED)
def test_operators_that_capture_spells_otherwise_have_a_form(name: str) -> None:
    b = Builder((2, 3, 4, 6))
    made = SPELLED[name](b)
    program = b.program(b.call(aten.neg.default, made))
    narrows.lower(program, samples=1)


def test_windows_over_the_batch_are_left_to_the_exporter() -> None:
    def forward(x: Tensor) -> Any:
        turned = x.permute(1, 2, 0)
        return F.max_pool1d(turned, 1), F.avg_pool1d(turned, 1)

    narrows.lower(narrows.capture(Net(forward).eval(), (X,)), samples=1)


# ------------------------------------------------------------------ the target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "onnx takes an opset from 18 to 25, got 17"),
        ({"opset": 26}, "onnx takes an opset from 18 to 25, got 26"),
        ({"form": "best"}, "onnx takes the form qdq, qlinear, integer, got 'best'"),
        ({"samples": 0}, "onnx takes 1 sample or more, got 0"),
        ({"inline_limit": 2_000_000_001}, "up to 2,000,000,000, got 2,000,000,001"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        OnnxTarget(**options)
    assert message in str(caught.value)


def test_options_at_their_ends() -> None:
    for opset in (18, 25):
        assert OnnxTarget(opset=opset, samples=1, inline_limit=2_000_000_000).opset == opset


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OnnxTarget.available() is None
    (whole,) = OnnxTarget.variants()
    assert (whole.missing, whole.lowers, whole.usable) == ("", True, True)
    missing = ("torch", "no_such_package", "nor_this")
    monkeypatch.setattr(OnnxTarget, "packages", missing)
    told = "it needs no_such_package, nor_this: pip install no_such_package nor_this"
    assert OnnxTarget.available() == told
    (lacking,) = OnnxTarget.variants()
    assert (lacking.missing, lacking.lowers, lacking.usable) == (told, False, False)
    assert lacking.needs == "no_such_package, nor_this"


def broken() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("x", "y")]
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_model_that_breaks_the_specification_is_refused() -> None:
    with pytest.raises(LowerError, match=r"(?s)breaks the ONNX specification.*NoSuchOperator"):
        target.check_specification(broken())


@pytest.mark.parametrize(("codes", "over"), [([64, -64], False), ([65, 0], True), ([-65], True)])
def test_products_that_are_cut_off(codes: list[int], over: bool) -> None:
    def model(*tensors: np.ndarray) -> Any:
        held = {str(i): SimpleNamespace(const_value=ir.tensor(t)) for i, t in enumerate(tensors)}
        return SimpleNamespace(graph=SimpleNamespace(initializers=held))

    weight, other = np.array(codes, np.int8), np.array([100], np.int32)
    assert target.overflows(model(weight, other)) == over
    assert not target.overflows(model(other))


# ------------------------------------------------------------------ the exporter


def test_an_exporter_that_writes_something_else_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = narrows.capture(Net(lambda x: x.cumsum(1)).eval(), (X,))  # no rule writes it
    other = SimpleNamespace(model=SimpleNamespace(opset_imports={"": 18}))
    for made, message in (
        (None, "torch.onnx.export returned nothing"),
        (other, r"(?s)cannot write this program for opset 20.*it wrote opset 18.*onnx\{opset=18\}"),
    ):
        monkeypatch.setattr(torch.onnx, "export", lambda *_, made=made, **__: made)
        with pytest.raises(LowerError, match=message):
            narrows.lower(program, samples=1)


@pytest.mark.parametrize(("size", "batch", "times"), [(6, 2, 3), (5, 2, 1), (2, 2, 1), (4, 0, 1)])
def test_how_many_batches_an_axis_holds(size: int, batch: int, times: int) -> None:
    assert export._times(size, batch) == times


def test_a_free_name_is_the_next_one() -> None:
    assert export._free_name("a", {"b"}) == "a"
    assert export._free_name("a", {"a", "a_2"}) == "a_3"


# ------------------------------------------------------------------ sessions


@pytest.fixture(scope="module")
def artifact() -> Any:
    return narrows.lower(narrows.capture(nn.Linear(6, 5).eval(), (X,)), samples=1)


def test_what_a_session_says(
    artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = OnnxSession(artifact.folder / "model.onnx")
    with pytest.raises(ArtifactError, match="ONNX Runtime failed"):
        session.run({})
    (tmp_path / "other.onnx").write_bytes(b"none")
    with pytest.raises(ArtifactError, match=r"cannot load other\.onnx"):
        OnnxSession(tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match="cannot load the model"):
        OnnxSession(b"none")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ArtifactError, match="not installed"):
        OnnxSession(artifact.folder / "model.onnx")


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_model_with_other_ends_than_its_manifest_is_refused(side: str, artifact: Any) -> None:
    ends = {k: [{"name": v["name"]} for v in artifact.manifest[k]] for k in ("inputs", "outputs")}
    assert open_session(artifact.folder, ends, 1).inference
    right = ends[side][0]["name"]
    ends[side] = [{"name": "other"}]
    with pytest.raises(ArtifactError) as caught:
        open_session(artifact.folder, ends, 1)
    assert caught.value.what == f"model.onnx has the {side} {right}"
    assert caught.value.why == "its manifest says other"


def test_a_model_with_its_weights_elsewhere_is_not_shown_node_by_node() -> None:
    program = narrows.capture(nn.Linear(6, 5).eval(), (X,))
    apart = narrows.lower(program, inline_limit=8, samples=1)
    assert rounding.probe(apart, program, [X]) is None
    other = program.with_weights({**program.weights, "bias": program.weights["bias"] + 1})
    assert first_difference(apart, other, [X]) == ""
    whole = narrows.lower(program, simplify=False, samples=1)
    assert first_difference(whole, other, [X]).startswith("linear")
    assert first_difference(whole, program, [X]) == ""


def test_a_model_that_cannot_show_its_nodes_tells_nothing(
    artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ArtifactError("it does not")

    monkeypatch.setattr(OnnxSession, "run", fails)
    program = narrows.capture(nn.Linear(6, 5).eval(), (X,))
    assert rounding.probe(artifact, program, [X]) is None


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "result", "allowed", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.5], [0.0, 0.5], True),
        ([1.0, 2.0], [1.1, 2.5], [0.0, 0.5], False),
        ([1.0, 2.0], [1.0, 2.6], [0.0, 0.5], False),
        ([1.0, NAN], [1.0, NAN], [0.0, 0.0], True),
        ([1.0, INF], [1.0, INF], [0.0, 0.0], True),
        ([1.0, INF], [1.0, 9.0], [9.0, 9.0], False),
        ([1.0, INF], [1.0, -INF], [9.0, 9.0], False),
        ([1.0, 2.0], [1.0], [9.0, 9.0], False),
    ],
)
def test_what_agrees(
    value: list[float], result: list[float], allowed: list[float], agrees: bool
) -> None:
    pair = torch.tensor(value), torch.tensor(result)
    assert rounding._agrees(*pair, lambda: torch.tensor(allowed)) == agrees


def test_whole_numbers_agree_where_they_are_equal() -> None:
    def never() -> Tensor:
        raise AssertionError

    assert rounding._agrees(torch.tensor([1, 2]), torch.tensor([1, 2]), never)
    assert not rounding._agrees(torch.tensor([1, 2]), torch.tensor([1, 3]), never)


# ------------------------------------------------------------------ clean-ups


def mean_over(axes: Any, rank: int | None, dtype: Any = ir.DataType.FLOAT, **how: Any) -> bool:
    """Whether a mean over some axes, an attribute or an input, is taken for a pooling."""
    shape = None if rank is None else ir.Shape([2, 3, 4, 5, 6][:rank])
    x = ir.Value(name="x", shape=shape, type=None if dtype is None else ir.TensorType(dtype))
    inputs: list[Any] = [x]
    attributes: dict[str, Any] = {}
    if how.get("given") == "attribute":
        attributes = {"axes": axes}
    elif how.get("given") == "computed":
        inputs.append(ir.Value(name="axes"))
    elif axes is not None:
        tensor = ir.tensor(np.array(axes, np.int64), name="axes")
        inputs.append(ir.Value(name="axes", const_value=tensor))
    return tidy._is_spatial_mean(ir.node("ReduceMean", inputs, attributes=attributes))


def test_which_means_are_poolings() -> None:
    for axes, rank in (([2, 3], 4), ([-1, -2], 4), ([2], 3), ([2, 3, 4], 5)):
        assert mean_over(axes, rank)
        assert mean_over(axes, rank, given="attribute")
        assert not mean_over(axes, rank, ir.DataType.INT64)
        assert not mean_over(axes, None)
        assert not mean_over(axes, rank, None)
        assert not mean_over(axes, rank, given="computed")
    for axes, rank in (([3], 4), ([1, 2, 3], 4), ([0, 2, 3], 4), ([1], 2), (None, 4), ([], 2)):
        assert not mean_over(axes, rank)


def identities() -> Any:
    """A model of identities behind an input, a weight, a sum, an output, and another identity."""
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Identity", ["w"], ["weight"]),
        helper.make_node("Add", ["x", "w"], ["sum"]),
        helper.make_node("Identity", ["sum"], ["total"]),
        helper.make_node("Identity", ["total"], ["again"]),
        helper.make_node("Identity", ["x"], ["inner"]),
        helper.make_node("Neg", ["inner"], ["turned"]),
        helper.make_node("Identity", ["turned"], ["other"], domain="elsewhere"),
    ]
    made = ["same", "weight", "total", "again", "other"]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in made],
        [numpy_helper.from_array(np.ones(2, np.float32), "w")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_identities_that_stay_and_go() -> None:
    model = identities()
    tidy.drop_identities(model)
    left = [(n.op_type, n.inputs[0].name, n.outputs[0].name) for n in model.graph]
    assert left == [
        ("Identity", "x", "same"), ("Identity", "w", "weight"), ("Add", "x", "total"),
        ("Identity", "total", "again"), ("Neg", "x", "turned"), ("Identity", "turned", "other"),
    ]  # fmt: skip
    assert [v.name for v in model.graph.outputs] == ["same", "weight", "total", "again", "other"]
    assert [list(v.shape) for v in model.graph.outputs] == [[2]] * 5


def test_constants_are_named_after_the_one_weight_they_are_made_of() -> None:
    def constant(name: str, shape: list[int], origins: str | None) -> Any:
        value = ir.Value(name=name, shape=ir.Shape(shape), const_value=ir.tensor(np.zeros(shape)))
        if origins is not None:
            value.metadata_props[tidy.FOLDED_FROM] = origins
        return value

    values = [
        constant("w", [2, 3], "['v']"), constant("a", [3, 2], "['w', 'x']"),
        constant("b", [3, 2], "['w']"), constant("c", [2, 3], "['w']"),
        constant("d", [4], "['v']"), constant("e", [2], "['w', 'v']"), constant("f", [2], None),
        constant("g", [4, 1], "['u']"),
    ]  # fmt: skip
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g")
    weights = {"w": torch.zeros(2, 3), "v": torch.zeros(4), "u": torch.zeros(1, 4)}
    tidy.name_constants(SimpleNamespace(graph=graph), weights)
    assert [v.name for v in values] == [
        "w", "w.T", "w.T.2", "w.folded", "v.folded", "e", "f", "u.T"
    ]  # fmt: skip


def small(weights: dict[str, int]) -> Any:
    """A model that adds all of its weights to an input, and returns one of them, too."""
    nodes = [helper.make_node("Add", ["x", n], [f"{n}_sum"]) for n in weights if n != "unread"]
    made = [f"{n}_sum" for n in weights if n != "unread"]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in [*made, "out"]],
        [numpy_helper.from_array(np.ones(size, np.float32), n) for n, size in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(model)


def test_large_weights_travel_as_inputs_and_come_back() -> None:
    most = simplify.WEIGHT_SIZE
    model = small({"less": most - 1, "large": most, "out": most, "unread": most})
    taken = simplify.take_weights(model)
    assert set(taken) == {"large", "unread"}
    assert [v.name for v in model.graph.inputs] == ["x", "large", "unread"]
    assert set(model.graph.initializers) == {"less", "out"}
    simplify.put_weights(model, taken)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert set(model.graph.initializers) == {"less", "out", "large"}
    assert model.graph.initializers["large"].const_value is taken["large"]


def test_a_simplifier_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, why in (
        (RuntimeError("no\nmore"), "because no\n"),
        (KeyError(), "because KeyError"),
    ):

        def fails(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr("onnxsim.simplify", fails)
        with pytest.raises(LowerError, match=f"(?s)onnxsim fails.*{why}.*simplify=False"):
            simplify.simplify(small({"w": 3}))


def test_what_a_simplifier_dropped_or_moved_is_restored() -> None:
    values = [ir.Value(name=n) for n in "ba"]
    simplify._restore(values, [("a", ir.Shape([1])), ("c", ir.Shape([2])), ("b", None)])
    assert [(v.name, v.shape) for v in values] == [("a", [1]), ("c", [2]), ("b", None)]


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("most", "axis", "group", "bits", "fits"),
    [
        (15, 1, 16, 4, True), (16, 1, 16, 8, False), (15, 0, 16, 4, False), (15, 1, 8, 4, False),
        (15, 1, 256, 4, True), (15, 1, 512, 4, False), (15, 1, 24, 4, False),
    ],
)  # fmt: skip
def test_which_groups_a_kernel_has(most: int, axis: int, group: int, bits: int, fits: bool) -> None:
    codes = torch.tensor([[0, most]], dtype=torch.uint8)
    packed = Packed(codes, torch.ones(1, 1), torch.zeros(1, 1), axis, group)
    assert (packed.bits, packed.fits) == (bits, fits)
    rounded = Packed(codes, torch.ones(1, 1), torch.zeros(1, 1), axis, group, rounded=True)
    assert rounded.fits == (fits or bits == 8)


def field(number: int, kind: int, data: bytes) -> bytes:
    return modelfile._key(number, kind) + data


def long(number: int, data: bytes) -> bytes:
    return field(number, modelfile.BYTES, modelfile._varint(len(data)) + data)


def test_an_outline_leaves_all_else_as_it_is(tmp_path: Path) -> None:
    """Numbers of every width, small weights, and those that lie at places of no good."""
    numbers = [
        field(20, modelfile.FIXED_64, bytes(range(8))), field(21, modelfile.FIXED_32, b"abcd"),
        field(22, modelfile.VARINT, modelfile._varint(300)),
    ]  # fmt: skip
    least = modelfile.LARGE - len(long(modelfile.RAW_DATA, bytes(modelfile.LARGE - 3)))
    raw = long(modelfile.RAW_DATA, bytes(modelfile.LARGE - 4 + least))
    assert len(raw) == modelfile.LARGE - 1
    path, placed = tmp_path / "model.onnx", []
    for filler in range(2 * modelfile.ALIGNMENT):
        for data in (raw, long(modelfile.RAW_DATA, bytes(modelfile.LARGE))):
            weight = long(modelfile.INITIALIZER, long(modelfile.DOC_STRING, b" " * filler) + data)
            whole = b"".join(numbers) + long(modelfile.GRAPH, weight + numbers[1]) + numbers[2]
            path.write_bytes(whole)
            made = outline(path)
            if made != whole:
                assert filler + len(data) >= modelfile.LARGE - 2
                graph = onnx.ModelProto.FromString(made[len(b"".join(numbers)) :]).graph
                told = {e.key: e.value for e in graph.initializer[0].external_data}
                assert int(told["offset"]) % modelfile.ALIGNMENT == 0
                placed.append(filler)
    assert len(placed) >= 2


def test_the_heads_of_weights_are_as_long_as_they_say() -> None:
    weights = {n: ir.tensor(np.zeros(k, np.int8), name=n) for n, k in (("a", 5), ("b", 300))}
    heads, size = modelfile._heads(weights, 7, 100)
    assert size == 100 + sum(map(len, heads)) + 305
    assert (7 + 100 + len(heads[0])) % modelfile.ALIGNMENT == 0
    assert (7 + 100 + sum(map(len, heads)) + 5) % modelfile.ALIGNMENT == 0
    assert [modelfile._varint(v) for v in (0, 127, 128, 300)] == [
        b"\x00", b"\x7f", b"\x80\x01", b"\xac\x02"
    ]  # fmt: skip
    assert modelfile._read_varint(b"\x00\xac\x02", 1) == (300, 3)
