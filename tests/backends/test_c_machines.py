"""The C code elsewhere: another compiler, the sanitizers, aarch64, and a Cortex-M4 in QEMU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import narrows
from narrows.backends.c import files
from narrows.backends.c.compiler import STRICT
from tests.networks import NETWORKS

START = Path(__file__).parent / "cortex_m"
NETS = ("squeeze_excite_hardsigmoid", "shuffle_block")
CORTEX_M = ("-mcpu=cortex-m4", "-mthumb", "--specs=rdimon.specs", f"-T{START / 'mps2.ld'}")


def require(*tools: str) -> None:
    missing = [t for t in tools if shutil.which(t) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module", params=NETS)
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = NETWORKS[request.param]
    inputs = tuple(x.float() for x in found.inputs(4, 1))
    program = narrows.capture(found.build().float(), inputs)
    integers = narrows.quantize(program, [inputs], check=False).program
    place = tmp_path_factory.mktemp("c") / "out"
    return narrows.lower(integers, "c", check=False).save(place)


def sources(folder: Path) -> list[Path]:
    return [folder / files.MODEL, folder / files.TEST]


def agrees(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert "8 of 8 vectors agree" in done.stdout, done
    assert done.returncode == 0


def build(compiler: str, flags: tuple[str, ...], program: Path, inputs: list[Path]) -> None:
    done = subprocess.run([compiler, *STRICT, *flags, "-o", program, *inputs], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_sanitizers_find_nothing(compiler: str, folder: Path, tmp_path: Path) -> None:
    require(compiler)
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    build(compiler, flags, tmp_path / "test", sources(folder))
    agrees([tmp_path / "test"])


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compilers_agree_with_all_optimizations(
    compiler: str, folder: Path, tmp_path: Path
) -> None:
    require(compiler)
    build(compiler, ("-O3", "-march=native"), tmp_path / "test", sources(folder))
    agrees([tmp_path / "test"])


def test_aarch64(folder: Path, tmp_path: Path) -> None:
    require("aarch64-linux-gnu-gcc", "qemu-aarch64")
    build("aarch64-linux-gnu-gcc", ("-O2", "-static"), tmp_path / "test", sources(folder))
    agrees(["qemu-aarch64", tmp_path / "test"])


def test_cortex_m(folder: Path, tmp_path: Path) -> None:
    require("arm-none-eabi-gcc", "qemu-system-arm")
    inputs = [*sources(folder), START / "start.c"]
    build("arm-none-eabi-gcc", ("-O2", *CORTEX_M), tmp_path / "test.elf", inputs)
    machine = ["-M", "mps2-an386", "-nographic", "-semihosting"]
    agrees(["qemu-system-arm", *machine, "-kernel", tmp_path / "test.elf"])


def test_the_object_needs_next_to_nothing(folder: Path, tmp_path: Path) -> None:
    require("arm-none-eabi-gcc", "arm-none-eabi-nm")
    line = ["arm-none-eabi-gcc", "-std=c99", "-Os", "-mcpu=cortex-m4", "-mthumb", "-c"]
    subprocess.run([*line, "-o", tmp_path / "m.o", folder / files.MODEL], check=True)
    line = ["arm-none-eabi-nm", "-u", str(tmp_path / "m.o")]
    listed = subprocess.run(line, capture_output=True, text=True)
    needed = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert needed <= {"memcpy", "memset", "__aeabi_ldivmod"}


@pytest.mark.parametrize("name", ["depthwise", "transposed_conv_grouped"])
@pytest.mark.parametrize("first_last", [None, 8])
def test_shifts_and_additions_do_without_products(
    name: str, first_last: int | None, tmp_path: Path
) -> None:
    require("gcc")
    found = NETWORKS[name]
    inputs = tuple(x.float() for x in found.inputs(4, 1))
    program = narrows.capture(found.build().float(), inputs)
    made = narrows.quantize(program, [inputs], check=False, weights=4, first_last=first_last)
    artifact = narrows.lower(made.program, "c", check=False)
    counts = re.search(r"(\d+) of (\d+) layers", (artifact.folder / files.REPORT).read_text())
    assert counts is not None
    assert (counts[1] == counts[2]) is (first_last is None)
    flags = ("-O1", "-DNARROWS_SHIFT_ADD", "-fsanitize=address,undefined")
    build("gcc", flags, tmp_path / "test", sources(artifact.folder))
    agrees([tmp_path / "test"])


def test_a_model_without_powers_of_two_says_so(folder: Path, tmp_path: Path) -> None:
    require("gcc")
    line = ["gcc", "-DNARROWS_SHIFT_ADD", "-c", "-o", tmp_path / "m.o", folder / files.MODEL]
    done = subprocess.run(line, capture_output=True, text=True)
    assert "no layer of this model has weights that are sums of two powers" in done.stderr
