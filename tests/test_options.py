"""Every option is said once, and is then everywhere: a text, a keyword, a flag, a key in JSON."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrows
from narrows.api.compressing import Compressing
from narrows.backends import target_names, target_type
from narrows.cli.flags import add_flags, given
from narrows.cli.parser import build_parser, parse
from narrows.errors import UsageError
from narrows.ir.program import Program
from narrows.options import first_sentence, flags_of, from_json, option, texts_of, to_json, whole
from narrows.passes.plans.options import Choosing
from narrows.passes.quant.options import Quantization, WeightOnly
from narrows.passes.quant.plan import QuantPlan

# The options, the function that takes them, and the commands that have their flags.
OWNERS: list[tuple[Any, Any, tuple[str, ...]]] = [
    (Choosing, narrows.plan, ("plan", "compile")),
    (Quantization, narrows.quantize, ("quantize", "compile")),
    (WeightOnly, narrows.quantize_weights, ("quantize-weights",)),
    (Compressing, narrows.compress, ("compress",)),
]
EACH = [(cls, call, words, f.name) for cls, call, words in OWNERS for f in dataclasses.fields(cls)]


@pytest.fixture(scope="module")
def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command in found.choices.values():
        command.complete()
    return dict(found.choices)


@pytest.mark.parametrize(
    ("cls", "call", "words", "name"), EACH, ids=[f"{c.__name__}-{n}" for c, _, _, n in EACH]
)
def test_an_option_is_in_the_signature_the_texts_the_command_line_and_json(
    cls: Any, call: Any, words: tuple[str, ...], name: str, commands: Any
):
    field = cls.__dataclass_fields__[name]
    parameter = inspect.signature(call).parameters[name]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert parameter.default == field.default
    text = texts_of(cls)[name]
    assert text[0].isupper()
    assert text.endswith(".")
    documented = " ".join((call.__doc__ or "").split())
    assert f" {name}: {text} " in f"{documented} "
    for word in words:
        action = commands[word]._option_string_actions[f"--{flags_of(cls)[name].name}"]
        assert action.help is not None
        assert action.help.startswith(first_sentence(text))
    assert json.loads(json.dumps(to_json(cls())))[name] == to_json(cls())[name]


@pytest.mark.parametrize(("cls", "call", "words"), OWNERS, ids=[c.__name__ for c, _, _ in OWNERS])
def test_a_signature_has_no_keywords_in_disguise(cls: Any, call: Any, words: Any):
    kinds = {p.kind for p in inspect.signature(call).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    names = [n for n in inspect.signature(call).parameters if n in cls.__dataclass_fields__]
    assert names == [f.name for f in dataclasses.fields(cls)]
    assert ", ...:" not in call.__doc__


@pytest.mark.parametrize("call", [narrows.plan, narrows.quantize, narrows.quantize_weights])
def test_an_unknown_keyword_gets_a_suggestion(call: Any):
    name = next(n for n in inspect.signature(call).parameters if n in ("ratio", "method"))
    with pytest.raises(UsageError) as caught:
        call(None, **{f"{name}x": 1})
    assert caught.value.what == f"{call.__name__} has no option '{name}x'"
    assert caught.value.hint == f"did you mean {name!r}?"


SPELLED = [
    (Choosing, "--no-zeros", {"zeros": False}),
    (Choosing, "--ratio layer4.*=0.7 --ratio 0.5", {"ratio": {"layer4.*": 0.7, "*": 0.5}}),
    (Choosing, "--ratio 0.5 --batch 4 --costs t.json",
     {"ratio": 0.5, "batch": 4, "costs": "t.json"}),
    (Choosing, "--latency 0.8 --min-width 2", {"latency": 0.8, "min_width": 2}),
    (Choosing, "--ratio 1 --include a --include b", {"ratio": 1.0, "include": ("a", "b")}),
    (Choosing, "--ratio 1 --scope global --exclude a",
     {"ratio": 1.0, "scope": "global", "exclude": ("a",)}),
    (Choosing, "--ratio 1 --no-constrained --side both",
     {"ratio": 1.0, "constrained": False, "side": "both"}),
    (Choosing, "--macs 0.7 --data x.npy --outputs logits",
     {"macs": 0.7, "data": "x.npy", "outputs": "logits"}),
    (Choosing, "--params 0.7", {"params": 0.7}),
    (Choosing, "--macs body=0.7 --macs head.*=0.9 --group body=a.* --group body=b.*",
     {"macs": {"body": 0.7, "head.*": 0.9}, "groups": {"body": ["a.*", "b.*"]}}),
    (Choosing, "--limit channels=0.7 --limit params:head.*=0.9 --allocator bisection",
     {"limits": {"channels": 0.7, "params": {"head.*": 0.9}}, "allocator": "bisection"}),
    (Compressing, "--macs 0.7 --bits 8", {"macs": 0.7, "bits": 8}),
    (Compressing, "--params 0.5 --outputs values", {"params": 0.5, "outputs": "values"}),
    (Compressing, "--latency 0.6 --compensation distill{seconds=60}",
     {"latency": 0.6, "compensation": "distill{seconds=60}"}),
    (Compressing, "--accuracy-drop 0.5", {"accuracy_drop": 0.5}),
    (Compressing, "--macs body=0.7 --group body=a.* --limit channels=0.7 --divergence 0.1",
     {"macs": {"body": 0.7}, "groups": {"body": ["a.*"]}, "limits": {"channels": 0.7},
      "divergence": 0.1}),
    (Compressing, "--macs 0.7 --allocator uniform", {"macs": 0.7, "allocator": "uniform"}),
    (Choosing, "--accuracy-drop 0.5 --evaluate nets.py:points",
     {"accuracy_drop": 0.5, "evaluate": "nets.py:points"}),
    (Choosing, "--divergence 0.1", {"divergence": 0.1}),
    (Choosing, "--criterion l2", {"criterion": "l2"}),
    (Choosing, "--ratio 1 --criterion taylor --data x.npy --criterion-loss nets.py:loss",
     {"ratio": 1.0, "criterion": "taylor", "data": "x.npy", "loss": "nets.py:loss"}),
    (Quantization, "--weight-bits head=8 --weight-bits pot4",
     {"weights": {"head": 8, "*": "pot4"}}),
    (Quantization, "--activation-bits a=16", {"activations": {"a": 16, "*": 8}}),
    (Quantization, "--method percentile --percentile 99.9",
     {"method": "percentile", "percentile": 99.9}),
    (Quantization, "--first-last none", {"first_last": None}),
    (Quantization, "--first-last float", {"first_last": "float"}),
    (Quantization, "--first-last 4 --skip a --skip b", {"first_last": 4, "skip": ("a", "b")}),
    (Quantization, "--rounding half_up --no-align", {"rounding": "half_up", "align": False}),
    (Quantization, "--equalize --no-correct-bias", {"equalize": True, "correct_bias": False}),
    (Quantization, "--strict --allow-lost", {"strict": True, "allow_lost": True}),
    (Quantization, "--activation-bits 4 --levels", {"activations": 4, "levels": True}),
    (Quantization, "--method rapq --budget 20 --loss norm --seed 3 --checkpoint c.pt",
     {"method": "rapq", "budget": 20, "loss": "norm", "seed": 3, "checkpoint": "c.pt"}),
    (Quantization, "--method rapq --budget 10m", {"method": "rapq", "budget": "10m"}),
    (WeightOnly, "--bits 3 --group 16 --groups input --method nearest --skip a"
     " --activations dynamic",
     {"bits": 3, "group": 16, "groups": "input", "method": "nearest", "skip": ("a",),
      "activations": "dynamic"}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "text", "wanted"), SPELLED, ids=[t for _, t, _ in SPELLED])
def test_the_command_line_json_and_python_say_the_same(cls: Any, text: str, wanted: dict[str, Any]):
    words = next(words for c, _, words in OWNERS if c is cls)
    for word in words:
        more = ["--data", "x.npy"] if word == "compress" else []
        found = given(parse([word, "x:y", "-o", "out", *more, *text.split()]), cls)
        assert found == wanted
    options = cls(**wanted)
    assert from_json(cls, json.loads(json.dumps(to_json(options))), "it") == normal(options)


def normal(options: Any) -> Any:
    """Return options with lists where JSON has them; those that are globs stay tuples."""
    lists = {n: list(v) for n, v in vars(options).items() if n in ("include", "exclude")}
    return dataclasses.replace(options, **lists)


def test_every_option_is_spelled_above():
    for cls, _, _ in OWNERS:
        spelled = {name for c, _, wanted in SPELLED if c is cls for name in wanted}
        assert spelled == set(cls.__dataclass_fields__)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quantize --weight-bits x", "--weight-bits x: 'x' is no number"),
        ("quantize --weight-bits a=4 --weight-bits a=5", "there is one for 'a' already"),
        ("quantize --first-last soft", "--first-last soft: 'soft' is no whole number"),
        ("quantize --percentile most", "--percentile most: 'most' is no number"),
        ("quantize --percentile 99", "percentile is an option of method='percentile', not of"),
        ("quantize --seed 1", "seed is an option of method='rapq', not of 'auto'"),
        ("quantize --weight-bits 9", "weights takes 2 to 8 bits, got 9"),
        ("quantize-weights --bits 1", "bits goes from 2 to 8, got 1"),
        ("quantize-weights", "there is no calibration data"),
        ("plan --ratio 1.5", "a ratio is a share from 0 to 1, got 1.5"),
        ("plan --latency 0.5 --ratio 0.5", "ratio and latency exclude each other"),
        ("plan --limit 0.5", "--limit 0.5: it names no budget"),
        ("plan --limit a=0.5 --limit a=0.6", "--limit a=0.6: there is one for 'a' already"),
        ("plan --limit a:b=0.5 --limit a:b=0.6", "a:b=0.6: there is one for 'a:b' already"),
        ("plan --limit a=0.5 --limit a:b=0.6", "a:b=0.6: there is one for 'a:b' already"),
        ("plan --limit a=b", "--limit b: 'b' is no number"),
        ("plan --macs 0.5 --group body", "--group body: it names no group"),
        ("plan --costs t.json", "costs has no effect without a latency or a ratio"),
        ("plan --min-width two", "--min-width two: 'two' is no whole number"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(
    words: str, message: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    command, *rest = words.split()
    data = ["--data", "no.npy"] if command == "quantize" else []
    assert narrows_main([command, "no_such_module:net", "-o", "out", *data, *rest]) == 2
    assert message in capsys.readouterr().err


def narrows_main(words: list[str]) -> int:
    from narrows.cli import main

    return main(words)


@pytest.mark.parametrize("name", target_names())
def test_a_flag_of_a_target_has_a_text(name: str, commands: Any):
    kind = target_type(name)
    for field, flag in flags_of(kind).items():
        action = commands["compile"]._option_string_actions[f"--{flag.name}"]
        assert action.help.startswith(first_sentence(texts_of(kind)[field]))


@dataclass(frozen=True)
class Sample:
    """Options to try.

    Attributes:
        size, depth: How much, as in 50% of it. More of that.
        json: A name that the command has already.
        kept: A field without a flag.
    """

    size: int = option(1, metavar="N", read=whole, off=0)
    depth: int | None = option(None, metavar="N", read=whole)
    json: bool = option(False)
    kept: object = None


def test_flags_are_made_of_fields(capsys: Any):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", dest="mine", action="store_true")
    add_flags(parser, Sample, mark="sample", known=["json"])
    told = " ".join(parser.format_help().split())
    assert "--size N how much, as in 50% of it (1; sample) --no-size the same as --size 0" in told
    assert "--depth N how much, as in 50% of it (sample)" in told
    assert "--kept" not in told
    assert given(parser.parse_args(["--no-size", "--depth", "4"]), Sample) == {
        "size": 0,
        "depth": 4,
    }
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-size", "--size", "4"])


def test_a_flag_of_a_target_that_the_command_has_too_stays_the_command_s():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    add_flags(parser, Sample, prefix="target_", known=["json"])
    arguments = parser.parse_args(["--json", "--size", "4"])
    assert arguments.json
    assert given(arguments, Sample, "target_") == {"size": 4}


def test_what_lives_in_memory_has_a_name_in_json():
    assert to_json(Sample(kept=object()))["kept"] == "<object>"
    assert to_json(Sample(kept=Path("a") / "b"))["kept"] == "a/b"
    with pytest.raises(UsageError, match=r"(?s)sample has no option 'sise'.*mean 'size'"):
        from_json(Sample, {"sise": 1}, "sample")


# ------------------------------------------------------------------ what has no effect, or is none


@pytest.mark.parametrize("cls", [c for c, _, _ in OWNERS])
def test_a_truth_value_is_one(cls: Any):
    for field in dataclasses.fields(cls):
        if isinstance(field.default, bool):
            with pytest.raises(UsageError, match=f"{field.name} is True or False, got 'no'"):
                cls(**{field.name: "no"})


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (Quantization, {"percentile": True, "method": "percentile"}, "percentile lies above 0"),
        (Quantization, {"checkpoint": 5, "method": "rapq"}, "checkpoint is the path of a file"),
        (WeightOnly, {"groups": ["input"]}, "groups is input, output, auto, got"),
    ],
)
def test_a_value_of_another_type_is_refused(cls: Any, given: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        cls(**given)


NET = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def program() -> Program:
    return narrows.capture(NET, (X,))


@pytest.fixture(scope="module")
def grids(program: Program) -> QuantPlan:
    return narrows.quantize(program, [X]).plan


@pytest.mark.parametrize(
    "given",
    [
        {"weights": 4}, {"activations": 7}, {"method": "minmax"}, {"skip": ["head"]},
        {"strict": True}, {"equalize": True}, {"calibration": [X]},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_nothing_counts_beside_a_plan_of_grids(program: Program, grids: QuantPlan, given: Any):
    told = f"{next(iter(given))} would have no effect beside a plan"
    with pytest.raises(UsageError, match=told):
        narrows.quantize(program, plan=grids, **given)
    with pytest.raises(UsageError, match=told):
        narrows.compile(NET, X, quantize={"plan": grids, **given}, check=False)


def test_a_plan_that_says_nothing_of_its_preparation_leaves_that_open(
    program: Program, grids: QuantPlan
):
    older = dataclasses.replace(grids, preparation=None, record=None)
    narrows.quantize(program, plan=older, activations=8, equalize=True)
    with pytest.raises(UsageError, match="strict would have no effect"):
        narrows.quantize(program, plan=older, strict=True)


def test_a_batch_counts_where_there_are_costs(program: Program):
    with pytest.raises(UsageError, match="batch is a whole number of at least 1, got 0"):
        narrows.apply(program, target="onnx", batch=0)
    with pytest.raises(UsageError, match="batch is a whole number of at least 1, got 0"):
        narrows.compile(NET, X, batch=0)
    with pytest.raises(UsageError, match="batch has no effect without costs"):
        narrows.plan(program, ratio=0.5, batch=4)
    with pytest.raises(UsageError, match="batch would have no effect with a target that has no"):
        narrows.apply(program, target="c", batch=4)


@pytest.mark.parametrize(
    ("aim", "hint"), [("ratio", "a ratio without a target, or"), ("latency", "a ratio, or")]
)
def test_a_target_without_costs_says_what_else_there_is(program: Program, aim: str, hint: str):
    with pytest.raises(UsageError, match="'c' has no cost table") as caught:
        narrows.plan(program, target="c", **{aim: 0.5})
    assert caught.value.hint.startswith(f"plan with {hint} give costs")
