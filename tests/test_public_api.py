"""The public names and their signatures: a change here is a change for users, and in CHANGELOG."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import narrows

FUNCTIONS = {
    "apply": "(program, plan=None, *, target=None, batch=None, integers=False, pipeline=None, "
    "check=True, instruments=())",
    "capture": "(model, example_inputs=None, *, kwargs=None, dynamic_batch=True, name=None, "
    "state=None)",
    "compile": "(model, inputs, plan=None, target='onnx', *, batch=None, pipeline=None, "
    "quantize=None, dump=None, "
    "kwargs=None, dynamic_batch=True, name=None, state=None, check=True, double=False, "
    "contest=None, instruments=(), on_result=None, **options)",
    "compensate": "(program, plan, *, data=None, method='least-squares', outputs='auto', "
    "progress=None)",
    "compress": "(model, inputs, *, data, target='onnx', evaluate=None, macs=None, params=None, "
    "latency=None, accuracy_drop=None, divergence=None, limits=None, groups=None, allocator=None, "
    "outputs='auto', bits=None, compensation='least-squares', "
    "kwargs=None, dynamic_batch=True, name=None, check=True, contest=None, "
    "progress=None)",
    "family": "(program, *, data, macs=None, params=None, allocator=None, outputs='auto', "
    "constrained=True, include=(), exclude=(), min_width=1, progress=None)",
    "load": "(path, *, trust=False)",
    "lower": "(program, target='onnx', *, plan=None, **options)",
    "quantize": "(program, calibration=None, *, weights=8, activations=8, method='auto', "
    "percentile=99.99, first_last=8, skip=(), rounding='half_even', align=True, "
    "equalize=False, correct_bias=True, strict=False, levels=False, allow_lost=False, "
    "budget=None, checkpoint=None, loss=None, seed=None, plan=None, check=True, instruments=())",
    "quantize_weights": "(program, calibration=None, *, bits=4, group=32, groups='auto', "
    "method='gptq', activations='float', skip=())",
    "sense": "(program, *, data, ratios=(0.25, 0.5, 0.75), criterion='l1', constrained=True, "
    "repair=None, bits=(), outputs='auto', evaluate=None, executor=None, jobs=None, cache=None, "
    "progress=None)",
    "plan": "(program, keep_inputs=None, keep_outputs=None, *, target=None, integers=False, "
    "executor=None, jobs=None, progress=None, "
    "macs=None, params=None, latency=None, accuracy_drop=None, divergence=None, limits=None, "
    "groups=None, allocator=None, outputs='auto', zeros=True, criterion='l1', data=None, "
    "loss=None, ratio=None, evaluate=None, costs=None, batch=None, "
    "constrained=True, side=None, scope='local', include=(), exclude=(), min_width=1)",
}
CLASSES = {
    "Artifact": "arrays fidelity gather gather_state identity inputs name notes open outputs "
    "owning plan report run run_flat save session size target",
    "ChannelPlan": "by_reason fingerprint from_json given inputs load masked merge narrows notes "
    "outputs reasons removed restore save shrink split to_json widths "
    "with_notes",
    "Pipeline": "check_order default parse passes run",
    "QuantPlan": "activations bare codes fingerprint floats follow from_json levels load narrows "
    "notes offsets parts preparation record rounding save to_json weights with_notes",
    "Quantized": "fake passes plan prepared program report",
    "Sensitivity": "checkpoint criterion examples figure fingerprint from_json load narrows of "
    "program repair rows save skipped to_json",
    "Solved": "applied load of plan save source weights",
    "Program": "aliases buffers canonical copy couplings dynamic_batch examples flat_inputs "
    "folded graph history in_spec marks memo name node nodes notes origins out_spec output "
    "parameter_count placeholders pruning recipes replace run_flat seal start state state_dict "
    "states stored tensor to to_module users_of weights with_weights",
}
ERRORS = {
    "ArtifactError",
    "CaptureError",
    "FidelityError",
    "LowerError",
    "NarrowsError",
    "OpError",
    "PassError",
    "PlanError",
    "ProgramError",
    "UsageError",
}


def signature(function: object) -> str:
    found = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


def test_names():
    assert set(narrows.__all__) == FUNCTIONS.keys() | CLASSES.keys() | ERRORS
    assert narrows.__all__ == sorted(narrows.__all__)


def test_every_name_is_listed_by_dir_and_can_be_had():
    for name in narrows.__all__:
        assert name in dir(narrows)
        assert getattr(narrows, name) is not None


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_signature(name: str):
    assert signature(getattr(narrows, name)) == FUNCTIONS[name]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_members(name: str):
    cls = getattr(narrows, name)
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    public = {m for m in {*vars(cls), *fields} if not m.startswith("_")}
    assert public == set(CLASSES[name].split())


@pytest.mark.parametrize("name", sorted(FUNCTIONS | CLASSES))
def test_docstring_says_what_you_get(name: str):
    first = (inspect.getdoc(getattr(narrows, name)) or "").split("\n\n")[0]
    assert first
    assert first.endswith((".", ":", "``."))


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_errors_are_one_family(name: str):
    assert issubclass(getattr(narrows, name), narrows.NarrowsError)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'kapture'"):
        narrows.kapture  # noqa: B018
