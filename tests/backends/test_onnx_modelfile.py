"""Model files are written weight by weight, and tell where their weights lie."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from narrows.backends.onnx import tidy
from narrows.backends.onnx.modelfile import ALIGNMENT, outline, write_model
from narrows.backends.onnx.session import OnnxSession

# Lengths below and above 2^7, 2^14 and 2^21 bytes, where the length of a length changes.
SIZES = {"tiny": 3, "small": 31, "middle": 5_000, "large": 600_001}


def model(arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Return a model that gives back its weights, each plus one; the weights are inputs."""
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in arrays.items()}
    one = [numpy_helper.from_array(np.ones(1, a.dtype), f"{n}_one") for n, a in arrays.items()]
    graph = helper.make_graph(
        [helper.make_node("Add", [n, f"{n}_one"], [f"{n}_out"]) for n in arrays],
        "weights",
        [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in arrays.items()],
        [helper.make_tensor_value_info(f"{n}_out", kinds[n], a.shape) for n, a in arrays.items()],
        one,
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="a test")


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int8])
def test_a_file_holds_what_it_was_given(tmp_path: Path, dtype: Any) -> None:
    draw = np.random.default_rng(0)
    arrays = {n: draw.integers(-9, 9, (size, 1)).astype(dtype) for n, size in SIZES.items()}
    path = tmp_path / "model.onnx"
    write_model(model(arrays), {n: ir.tensor(a, name=n) for n, a in arrays.items()}, path)
    onnx.checker.check_model(path, full_check=True)
    read = onnx.load(path)
    assert (read.producer_name, read.graph.name) == ("a test", "weights")
    assert not read.graph.input
    found = {t.name: numpy_helper.to_array(t) for t in read.graph.initializer}
    assert found.keys() == {*arrays, *(f"{n}_one" for n in arrays)}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    assert path.read_bytes() != outline(path)
    results = OnnxSession(outline(path), folder=tmp_path).run({})
    for result, array in zip(results, arrays.values(), strict=True):
        assert np.array_equal(result, array + dtype(1))


def test_an_outline_names_aligned_places_of_large_weights(tmp_path: Path) -> None:
    arrays = {n: np.arange(size, dtype=np.int16) for n, size in SIZES.items()}
    path = tmp_path / "model.onnx"
    write_model(model(arrays), {n: ir.tensor(a, name=n) for n, a in arrays.items()}, path)
    data, placed = path.read_bytes(), 0
    for tensor in onnx.ModelProto.FromString(outline(path)).graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            assert len(tensor.raw_data) < 1024
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        start, length = int(where["offset"]), int(where["length"])
        assert where["location"] == path.name
        assert start % ALIGNMENT == 0
        assert data[start : start + length] == arrays[tensor.name].tobytes()
        placed += 1
    assert placed == 2


def test_every_length_of_the_rest_is_provided_for(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.float32)
    path = tmp_path / "model.onnx"
    for length in range(100, 140):  # a producer's name of such a length moves all that follows
        made = model({"w": array})
        made.producer_name = "p" * length
        write_model(made, {"w": ir.tensor(array, name="w")}, path)
        (tensor,) = [t for t in onnx.load(path).graph.initializer if t.name == "w"]
        assert np.array_equal(numpy_helper.to_array(tensor), array)
        assert len(outline(path)) < array.nbytes


def test_what_is_no_model_has_no_outline(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x0bnonsense")
    with pytest.raises(ValueError, match="there is no field type 3"):
        outline(path)
    path.write_bytes(b"\x3a\x7fshort")
    with pytest.raises(ValueError, match="a field ends behind its message"):
        outline(path)


def test_a_name_that_is_taken_gets_the_next_number() -> None:
    held = dict.fromkeys(["w.T", "w.T.2"])
    model = SimpleNamespace(graph=SimpleNamespace(initializers=held))
    assert tidy._free_name(model, "v.T") == "v.T"
    assert tidy._free_name(model, "w.T") == "w.T.3"
    del held["w.T.2"]
    assert tidy._free_name(model, "w.T") == "w.T.2"
