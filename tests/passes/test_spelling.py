"""The spelling of pipelines, and the catalog that finds passes by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows import registry
from narrows.errors import PassError, UsageError
from narrows.passes import catalog
from narrows.passes.base import Pass
from narrows.passes.pipeline import Pipeline
from narrows.passes.spelling import parse_options, spell_value
from tests.passes.samples import Options, register


@pytest.fixture(autouse=True)
def _own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


# ------------------------------------------------------------------ spelling


@pytest.mark.parametrize(
    ("text", "pass_"),
    [
        ("options", Options()),
        ("options{}", Options()),
        ("options{flag=true, count=-3}", Options(flag=True, count=-3)),
        ("options{rate=1e-05}", Options(rate=1e-5)),
        ("options{rate=2}", Options(rate=2.0)),
        ("options{rate=-inf}", Options(rate=float("-inf"))),
        ("options{text=out/p.json}", Options(text="out/p.json")),
        ('options{text="a b, {c}"}', Options(text="a b, {c}")),
        ('options{text="say \\"hi\\""}', Options(text='say "hi"')),
        ('options{text="true"}', Options(text="true")),
        ('options{text="12"}', Options(text="12")),
        ('options{text=""}', Options(text="")),
        ("options{maybe=layer*.conv}", Options(maybe="layer*.conv")),
        ("options{sizes=(8, 16)}", Options(sizes=(8, 16))),
        ("options{sizes=(8)}", Options(sizes=(8,))),
        ("options{mode=b}", Options(mode="b")),
        ("options{any-value=(1, (none, x))}", Options(any_value=(1, (None, "x")))),
        ("options{any_value=false}", Options(any_value=False)),
    ],
)
def test_a_pass_reads_and_prints(text: str, pass_: Options):
    assert Pipeline.parse(text).passes == (pass_,)
    assert Pipeline.parse(str(pass_)).passes == (pass_,)


def test_one_spelling_per_pipeline():
    text = 'options{text="a b", sizes=(1, 2), any-value=true} ,fold-batch-norm,  eliminate-dead{}'
    pipeline = Pipeline.parse(text)
    assert len(pipeline.passes) == 3
    assert str(pipeline) == (
        'options{text="a b", sizes=(1, 2), any-value=true}, fold-batch-norm, eliminate-dead'
    )
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.parse("") == Pipeline()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(values)
def test_every_value_reads_back(value: Any):
    name, options = parse_options(f"x{{v={spell_value(value)}}}")
    assert name == "x"
    assert options["v"] == value
    assert type(options["v"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold-batch-nrm", "there is no pass 'fold-batch-nrm'"),
        ("fold-batch-norm eliminate-dead", "expected ',' between passes, got 'e'"),
        ("options{flag}", "expected '=' after option 'flag', got '}'"),
        ("options{flag=", "expected a value, got the end"),
        ("options{flag=true count=1}", "expected ',' between options, got 'c'"),
        ("options{flag=true", "expected ',' between options, got the end"),
        ("options{flag=true, flag=false}", "option 'flag' stands twice"),
        ('options{text="a', "expected a closing quote"),
        ('options{text="\\x"}', "a string is malformed"),
        ("options{sizes=(1 2)}", "expected ',' between values"),
        ("{x=1}", "expected a name"),
        ("options{any-value=<Plan>}", "lives in memory only"),
        ("options{colour=1}", "options has no option 'colour'"),
        ("options{count=1.5}", "option 'count' of options takes int, got 1.5"),
        ("options{count=true}", "option 'count' of options takes int, got true"),
        ("options{sizes=(1, x)}", "option 'sizes' of options takes tuple[int, ...], got (1, x)"),
        ("options{mode=c}", "option 'mode' of options takes typing.Literal['a', 'b'], got c"),
        ("needs", "needs needs the option 'must'"),
    ],
)
def test_malformed_text_is_refused_with_its_place(text: str, message: str):
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    assert message in str(caught.value)
    assert f"of {text!r}" in caught.value.where


def test_the_place_is_a_column_and_the_hint_a_suggestion():
    with pytest.raises(UsageError) as caught:
        Pipeline.parse("eliminate-dead, fold-batch-nrm")
    assert str(caught.value) == (
        "there is no pass 'fold-batch-nrm'\n"
        "  at column 17 of 'eliminate-dead, fold-batch-nrm'\n"
        "  because known are align-channels, choose-kernels, convert-batch-norm, "
        "decompose-attention, eliminate-dead, equalize-channels, fold-batch-norm, fold-shifts, "
        "fold-weights, legalize-reads, lossy, merge-linear, needs, options, prune-channels, "
        "quantize, reorder-channels, scale, scale-parts, widen-clips\n"
        "  try: did you mean 'fold-batch-norm'?"
    )


def test_an_object_in_memory_has_a_spelling_that_does_not_read_back():
    text = str(Options(any_value=object()))
    assert text == "options{any-value=<object>}"
    with pytest.raises(UsageError, match="save it and name the file"):
        Pipeline.parse(text)


def test_a_path_is_spelled_like_text():
    assert str(Options(any_value=Path("out") / "p.json")) == "options{any-value=out/p.json}"


def test_a_pipeline_holds_passes_only():
    with pytest.raises(PassError, match="a pipeline holds passes, got str"):
        Pipeline(["fold-batch-norm"])  # type: ignore[list-item]


# ------------------------------------------------------------------ catalog


class Entry:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value


def with_entries(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(registry, "installed", lambda group: list(entries))


def test_a_pass_from_outside_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "PASSES", replace(catalog.PASSES, builtin={}))
    with_entries(monkeypatch, Entry("options", "tests.passes.samples:Options"))
    assert catalog.lookup("options") is Options


def test_two_providers_of_one_name_are_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch):
    with_entries(monkeypatch, Entry("fold-batch-norm", "other.package:Fold"))
    with pytest.raises(PassError) as caught:
        catalog.lookup("fold-batch-norm")
    assert "other.package:Fold" in caught.value.why
    assert "narrows.passes.fold_batch_norm:FoldBatchNorm" in caught.value.why


@pytest.mark.parametrize("value", ["no_such_module:X", "tests.passes.samples:NoSuchClass"])
def test_a_pass_that_cannot_be_imported_names_its_provider(
    monkeypatch: pytest.MonkeyPatch, value: str
):
    with_entries(monkeypatch, Entry("lost", value))
    with pytest.raises(PassError, match=f"cannot import the pass 'lost' from {value}"):
        catalog.lookup("lost")


def test_a_pass_under_a_false_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    with_entries(monkeypatch, Entry("other", "tests.passes.samples:Options"))
    with pytest.raises(PassError, match="calls itself 'options'"):
        catalog.lookup("other")


def test_every_builtin_pass_can_be_imported():
    for name in catalog.BUILTIN:
        assert issubclass(catalog.lookup(name), Pass)
