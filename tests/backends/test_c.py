"""The C target: what comes out, what is refused, and that a wrong number is found."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.backends import make_target
from narrows.backends.c import compiler, files, rules, source
from narrows.backends.c.target import CTarget
from narrows.cli import main
from narrows.errors import ArtifactError, LowerError, UsageError
from narrows.ir.program import Program
from tests.builder import Builder, aten, ramp
from tests.networks import NETWORKS

needs_compiler = pytest.mark.skipif(not compiler.find_compiler(), reason="there is no C compiler")


def quantized(name: str, **options: Any) -> Program:
    found = NETWORKS[name]
    inputs = tuple(x.float() if x.is_floating_point() else x for x in found.inputs(4, 1))
    program = narrows.capture(found.build().float(), inputs)
    return narrows.quantize(program, [inputs], check=False, **options).program


def layers(**options: Any) -> Program:
    b = Builder((2, 3, 6, 6))
    x = b.relu(b.conv(b.inputs[0], "first", 5, 3, bias=True))
    program = b.program(b.call(aten.add.Tensor, b.conv(x, "second", 5, 5), x, name="sum"))
    return narrows.quantize(program, [program.examples[0]], check=False, **options).program


# ------------------------------------------------------------------ what comes out


@needs_compiler
@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
@pytest.mark.parametrize(
    "name",
    ["residual_projection", "depthwise", "dense_block", "squeeze_excite_sigmoid", "two_inputs",
     "class_token", "transposed_conv_grouped", "group_norm", "multihead_attention"],
)  # fmt: skip
def test_the_code_is_the_interpreter(name: str, rounding: str, monkeypatch) -> None:
    monkeypatch.setattr("narrows.backends.c.session.FAST", ("-O1", "-DNARROWS_LANES=32"))
    artifact = narrows.lower(quantized(name, rounding=rounding), "c")  # lower itself compares
    assert artifact.fidelity["checked"][0]["error"] == 0.0
    facts = artifact.manifest["c"]
    assert facts["bound"] <= facts["arena"] <= 1.1 * facts["bound"]


@needs_compiler
def test_the_files_build_and_test_themselves(tmp_path: Path) -> None:
    narrows.lower(layers(), "c", check=False).save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*files.FILES, "manifest.json"}
    line = ["make", "test", "CFLAGS=-O1"]
    done = subprocess.run(line, cwd=tmp_path / "out", capture_output=True, text=True)
    assert "8 of 8 vectors agree" in done.stdout, done
    assert narrows.load(tmp_path / "out").run(np.zeros((1, 3, 6, 6), np.float32)).shape[1] == 5
    assert main(["check", str(tmp_path / "out")]) == 0


@needs_compiler
def test_vectors_find_a_wrong_model(tmp_path: Path) -> None:
    narrows.lower(layers(), "c", check=False).save(tmp_path / "out")
    source = tmp_path / "out" / "model.c"
    source.write_text(re.sub(r"bias\[5 \+ 11\] = \{\n    -?\d+", r"bias[5 + 11] = {\n    77",
                             source.read_text()))  # fmt: skip
    line = ["make", "test", "CFLAGS=-O1"]
    done = subprocess.run(line, cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode
    assert "vector 0 differs" in done.stdout
    with pytest.raises(ArtifactError, match="is corrupt"):
        narrows.load(tmp_path / "out")


def test_the_code_reads_well() -> None:
    artifact = narrows.lower(layers(), "c", check=False, prefix="digits")
    source = (artifact.folder / files.MODEL).read_text()
    header = (artifact.folder / files.HEADER).read_text()
    assert re.search(r"/\* first: conv of x_q 2x3x6x6|/\* first: conv of .* net.py:1 \*/", source)
    assert "int digits_run(const uint8_t *in_" in header
    assert "digits_quantize_in_" in header
    assert max(map(len, source.splitlines())) <= 110
    code = re.sub(r"/\*.*?\*/", "", source, flags=re.S)
    assert not re.search(r"\b(float|double|malloc|free)\b|math\.h", code)
    report = (artifact.folder / files.REPORT).read_text()
    assert "lower bound" in report
    assert "live at the peak" in report
    assert any("lower bound" in n["message"] for n in artifact.notes)


@needs_compiler
def test_the_header_converts_as_the_interpreter(tmp_path: Path) -> None:
    artifact = narrows.lower(layers(), "c", check=False)
    port = artifact.manifest["c"]["inputs"][0]
    name = re.search(r"narrows_quantize_\w+", (artifact.folder / files.HEADER).read_text())[0]
    (tmp_path / "convert.c").write_text(
        '#include "model.h"\n#include <stdio.h>\nint main(void)\n{\n    float x;\n'
        f'    while (scanf("%f", &x) == 1)\n        printf("%d ", {name}(x));\n    return 0;\n}}\n'
    )
    flags = ("-O1", f"-I{artifact.folder}")
    compiler.build([tmp_path / "convert.c"], tmp_path / "convert", flags)
    step = 2.0 ** -port["codes"][0]
    values = [*(i * step / 4 for i in range(-1100, 1100)), 1e30, -1e30]
    text = " ".join(map(repr, values))
    done = subprocess.run([tmp_path / "convert"], input=text, capture_output=True, text=True)
    wanted = torch.ops.narrows.quantize.default(
        torch.tensor(values), *port["codes"], port["rounding"]
    )
    assert list(map(int, done.stdout.split())) == wanted.tolist()


@needs_compiler
def test_batches_and_wide_sums() -> None:
    program = layers()
    assert narrows.lower(program, "c", batch=3, samples=1).inputs[0].shape[0] == 3
    program = program.copy()
    layer = program.node("first")
    program.weights["first.large"] = torch.full((5,), 2**31 - 2**16, dtype=torch.int32)
    with program.graph.inserting_before(layer):
        layer.update_arg(2, program.graph.get_attr("first.large"))
    layer.update_arg(3, [23])
    artifact = narrows.lower(program, "c", samples=1)
    assert "sums in 64 bits, because of first" in (artifact.folder / files.REPORT).read_text()


@needs_compiler
def test_indices_out_of_range_are_told() -> None:
    artifact = narrows.lower(quantized("tied_embedding"), "c", check=False)
    ids = np.zeros(artifact.inputs[0].shape, np.int64)
    assert artifact.open(optimize=False).run({artifact.inputs[0].name: ids})
    with pytest.raises(ArtifactError, match=r"(?s)refuses its input.*index is out of range"):
        artifact.open(optimize=False).run({artifact.inputs[0].name: ids - 1})


# ------------------------------------------------------------------ what is refused


def test_floats_are_refused_with_the_lines() -> None:
    with pytest.raises(LowerError, match="the c target writes integer programs"):
        narrows.lower(narrows.capture(NETWORKS["mlp"].build(), NETWORKS["mlp"].inputs()), "c")
    with pytest.raises(LowerError, match=r"(?s)does not .* everywhere: cumsum.default"
                       r".*tests/networks/.*\.py:\d+") as caught:  # fmt: skip
        narrows.lower(quantized("cumsum_space"), "c")
    assert "strict=True" in caught.value.hint


def test_what_a_program_must_not_take_or_return() -> None:
    b = Builder((2, 3, 6, 6))
    x = b.conv(b.inputs[0], "conv", 4, 3)
    program = b.program(x, b.weight("table", ramp(3)))
    with pytest.raises(LowerError, match="the output table is a number that depends on no input"):
        narrows.lower(narrows.quantize(program, [program.examples[0]], check=False).program, "c")
    fixed = layers().replace(dynamic_batch=False)
    with pytest.raises(LowerError, match=r"c\{batch=3\} would have no effect"):
        narrows.lower(fixed, "c", batch=3)


@needs_compiler
def test_an_output_that_is_read_again_stays_as_it_is() -> None:
    b = Builder((2, 3, 6, 6))
    x = b.relu(b.conv(b.inputs[0], "conv", 4, 3))
    y = b.call(aten.add.Tensor, x, x, name="twice")
    program = b.program(x, y, b.call(aten.permute.default, y, [0, 2, 3, 1], name="turned"))
    made = narrows.quantize(program, [program.examples[0]], check=False).program
    artifact = narrows.lower(made, "c", check=False)
    inputs = [e[:1] for e in made.examples]
    actual = artifact.run_flat(inputs, optimize=False)
    for got, wanted in zip(actual, made.run_flat(inputs), strict=True):
        assert torch.equal(torch.from_numpy(got), wanted)


def test_fake_quantized_programs_are_refused() -> None:
    b = Builder((2, 3, 6, 6))
    program = b.program(b.conv(b.inputs[0], "conv", 4, 3))
    fake = narrows.quantize(program, [program.examples[0]], check=False).fake
    with pytest.raises(LowerError, match="its integers are not folded yet"):
        narrows.lower(fake, "c")


def test_an_arena_beyond_the_limit_names_what_is_live() -> None:
    with pytest.raises(LowerError, match=r"(?s)arena takes .* ram=100B allows 100.*first \(180\)"):
        narrows.lower(layers(), "c", ram="100B")
    assert narrows.lower(layers(), "c", ram="256K", check=False).manifest["c"]["arena"] < 2**18


def test_the_command_line_compiles_to_c(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")  # the command, not the compiler, is meant
    (tmp_path / "nets.py").write_text("import torch\nnet = torch.nn.Conv2d(3, 4, 3).eval()\n")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).random((4, 3, 8, 8), np.float32))
    line = [
        "compile",
        f"{tmp_path / 'nets.py'}:net",
        "-i",
        "f32[2,3,8,8]",
        "-o",
        str(tmp_path / "o"),
    ]
    assert main([*line, "-t", "c"]) == 1
    assert "narrows compile --quantize" in capsys.readouterr().err
    line += ["--quantize", str(tmp_path / "data.npy"), "-t"]
    assert main([*line, "c{ram=64B}"]) == 1
    assert "the arena takes" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert main([*line, "c{ram=1K}"]) == 0
    assert "the lower bound" in capsys.readouterr().out


def test_bad_options_are_refused() -> None:
    for options, text in (
        ({"ram": "lots"}, "takes a ram such as 64K"), ({"batch": 0}, "takes a batch of 1"),
        ({"prefix": "9x"}, "prefix that is a name in C"), ({"heap": 1}, "has no option 'heap'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=text):
            make_target("c", **options)


def test_without_a_compiler_the_code_is_written_and_not_run(monkeypatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    artifact = narrows.lower(layers(), "c")
    assert artifact.fidelity == {}
    assert any("there is no C compiler" in n["message"] for n in artifact.notes)
    with pytest.raises(ArtifactError, match=r"(?s)cannot be compiled.*try: install gcc or clang"):
        artifact.run(np.zeros((1, 3, 6, 6), np.float32))
    (row,) = CTarget.variants()
    assert "install gcc or clang" in row.missing


@needs_compiler
def test_a_wrong_number_is_found(monkeypatch) -> None:
    right = rules.ends
    monkeypatch.setattr(rules, "ends", lambda args: right({**args, "high": args["high"] - 100}))
    monkeypatch.setattr("narrows.backends.c.session.FAST", ("-O0",))
    with pytest.raises(LowerError, match="of the C code differs from the program"):
        narrows.lower(layers(), "c")


@needs_compiler
def test_the_check_builds_for_speed_and_without(monkeypatch) -> None:
    monkeypatch.setattr("narrows.backends.c.session.PLAIN", ("--no-such-option",))
    with pytest.raises(LowerError, match="the C code cannot be checked"):
        narrows.lower(layers(), "c")


def test_a_bound_knows_the_codes_on_both_sides_of_the_zero_point() -> None:
    bytes_, words = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int16)
    assert [rules.reach({"x": bytes_, "x_zero": z}, "x") for z in (0, 3, 200)] == [255, 252, 200]
    assert [rules.reach({"x": words, "x_zero": z}, "x") for z in (-9, 0)] == [32776, 32768]


@needs_compiler
@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
def test_all_kernels_stand_in_one_file(tmp_path: Path, rounding: str) -> None:
    """A network may use any of them together, so no two have one name."""
    parts = {"rounding": rounding, "divided": f"divided_{rounding}", "whole": f"whole_{rounding}"}
    names = ["preamble", "no_terms", *(parts.get(part, part) for part in source.ORDER)]
    texts = [source.kernel(name).replace("FINAL", "scaled") for name in names]
    texts.insert(1, "typedef int32_t number;\n")
    texts.append("int main(void) { return 0; }\n")
    (tmp_path / "model.h").write_text("#include <stdint.h>\n", encoding="utf-8")
    (tmp_path / "all.c").write_text("\n".join(texts), encoding="utf-8")
    compiler.build([tmp_path / "all.c"], tmp_path / "all", ["-Wno-unused-function"])


def test_an_embedding_of_computed_indices_is_refused_for_them() -> None:
    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(F.relu(self.table(ids + 1)))

    ids = torch.arange(8).reshape(2, 4)
    program = narrows.capture(Next().eval(), (ids,))
    quantized = narrows.quantize(program, [ids], check=False).program
    with pytest.raises(LowerError, match="its indices are computed"):
        narrows.lower(quantized, "c", check=False)
