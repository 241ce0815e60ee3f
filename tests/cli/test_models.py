"""From words to a model, its checkpoint and its inputs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from narrows.cli.model import InputSpec, make_inputs, make_model, make_states, parse_input
from narrows.errors import UsageError
from narrows.frontend.checkpoint import load_checkpoint

INPUT = ("-i", "f32[2,3,8,8]")


# ------------------------------------------------------------------ models and inputs


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("cli_nets.py", "names no model"),
        (":small", "names no model"),
        ("cli_nets.py:", "names no model"),
        ("no.py:small", "there is no file 'no.py'"),
        ("no_such_module:small", "cannot import 'no_such_module': ModuleNotFoundError"),
        ("cli_nets.py:smal", "has no 'smal'"),
        ("cli_nets.py:WIDTH", "is no function: it is a int"),
        ("cli_nets.py:broken", "cli_nets.py:broken() failed: ValueError: no data"),
        ("cli_nets.py:broken", '  raise ValueError("no data")'),
        ("cli_nets.py:needy", "cannot be called: missing a required argument: 'width'"),
        ("cli_nets.py:text", "returned a str, not a torch.nn.Module"),
        ("bad.py:small", "cannot import bad.py: SyntaxError"),
    ],
)
def test_a_model_that_cannot_be_made_is_wrong_usage(nets, run, model, message):
    Path("bad.py").write_text("def")
    code, _, err = run("ops", model, *INPUT)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("model", ["cli_nets.py:small", "cli_nets:small", "cli_nets:Small"])
def test_models_from_files_modules_and_classes(nets, model: str):
    assert type(make_model(model)).__name__ == "Small"


def test_a_module_that_is_a_model_already_is_taken(nets):
    assert isinstance(make_model("cli_nets.py:ready"), nn.Module)


def test_a_module_that_is_a_file_is_suggested(nets, run):
    Path("bad.py").write_text("def")
    assert "try: bad.py:FACTORY" in run("ops", "bad:x", *INPUT)[2]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("f32[1,3,224,224]", InputSpec("", "float32", (1, 3, 224, 224))),
        ("float64[2]", InputSpec("", "float64", (2,))),
        ("bf16[]", InputSpec("", "bfloat16", ())),
        ("i64[2,16]:1000", InputSpec("", "int64", (2, 16), 1000)),
        ("mask=bool[2, 16]", InputSpec("mask", "bool", (2, 16))),
    ],
)
def test_inputs_are_read(text: str, spec: InputSpec):
    assert parse_input(text) == spec
    sample = spec.sample()
    assert tuple(sample.shape) == spec.shape
    assert str(sample.dtype) == f"torch.{spec.dtype}"
    if not sample.is_floating_point():
        assert 0 <= int(sample.min()) <= int(sample.max()) < spec.high


def test_states_are_read():
    assert make_states([]) is None
    assert make_states(["cache=1", "hidden=1.h"]) == {"cache": (1,), "hidden": (1, "h")}
    for wrong in (["cache"], ["=1"], ["cache=1."], ["cache=1", "cache=2"]):
        with pytest.raises(UsageError, match=f"--state '{wrong[-1]}' is no state"):
            make_states(wrong)


def test_a_state_goes_from_the_shell_to_the_report(tmp_path: Path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("step.py").write_text(
        "from torch import nn\n\n\nclass Step(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)\n\n"
        "    def forward(self, x, h):\n"
        "        h = h * 0.5 + self.a(x)\n"
        "        return self.b(h), h\n"
    )
    words = ["compile", "step.py:Step", "-i", "f32[2,3]", "-i", "f32[2,8]", "--state", "h=1"]
    code, out, err = run(*words, "--ratio", "0.5", "-o", "out")
    assert code == 0, err
    assert "h: 8 -> 4 channels (kept: " in out + err
    assert "h  goes in again from output 1, 4 of 8 channels" in run("check", "out")[1] + out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f32", "input 'f32' is malformed"),
        ("f32[1,2", "is malformed"),
        ("f33[1]", "unknown dtype 'f33'"),
        ("f32[1,,2]", "a size that is no positive number"),
        ("f32[0]", "a size that is no positive number"),
        ("f32[2]:9", "only integers have a bound"),
    ],
)
def test_malformed_inputs_are_wrong_usage(text: str, message: str):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        parse_input(text)


def test_inputs_are_the_same_every_time_and_leave_the_seed_alone():
    state = torch.get_rng_state()
    (a, b), named = make_inputs(["f32[2,3]", "i64[4]:9", "m=f32[2]"])
    (c, d), again = make_inputs(["f32[2,3]", "i64[4]:9", "m=f32[2]"])
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert torch.equal(named["m"], again["m"])
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_and_repeated_inputs_are_wrong_usage(nets, run):
    code, _, err = run("ops", f"{nets}:small")
    assert code == 2
    assert "the model's inputs are missing" in err
    assert "try: -i f32[2,3,224,224]" in err
    code, _, err = run("ops", f"{nets}:Named", "-i", "mask=f32[2]", "-i", "mask=f32[2]")
    assert code == 2
    assert "input 'mask' is given twice" in err


def test_inputs_by_name_reach_the_model(nets, run):
    code, out, err = run("ops", f"{nets}:Named", "-i", "f32[2,3]", "-i", "mask=f32[2,3]")
    assert code == 0, err
    assert "every operator of Named has a row" in out


# ------------------------------------------------------------------ checkpoints


def state() -> dict[str, torch.Tensor]:
    return nn.Conv2d(1, 2, 1).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
)
def test_checkpoints_as_training_scripts_write_them(tmp_path: Path, wrap):
    torch.save(wrap(state()), tmp_path / "w.pt")
    assert load_checkpoint(tmp_path / "w.pt").keys() == {"weight", "bias"}


def test_safetensors(tmp_path: Path):
    expected = state()
    save_file(expected, tmp_path / "w.safetensors")
    got = load_checkpoint(tmp_path / "w.safetensors")
    assert all(torch.equal(got[k], expected[k]) for k in expected)


class Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "boom"))


def test_a_pickle_runs_only_when_allowed(nets, tmp_path: Path):
    with open("w.pth", "wb") as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(UsageError) as caught:
        load_checkpoint("w.pth")
    assert "--allow-pickle" in caught.value.hint
    assert not Path("exploded").exists()
    torch.save(nn.Conv2d(1, 2, 1), "whole.pth")
    with pytest.raises(UsageError, match="holds more than tensors"):
        load_checkpoint("whole.pth")
    assert load_checkpoint("whole.pth", allow_pickle=True).keys() == {"weight", "bias"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.bin", b"", "cannot read w.bin"),
        ("w.safetensors", b"not one", "the checkpoint is damaged"),
        ("w.pt", b"not one", "checkpoint"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_checkpoint(tmp_path / name)


def test_a_checkpoint_without_weights(tmp_path: Path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds no state dict"):
        load_checkpoint(tmp_path / "w.pt")


def test_weights_must_fit_the_model(nets, run):
    weights = make_model(f"{nets}:small").state_dict()
    words = ("ops", f"{nets}:small", *INPUT, "--weights", "w.pt")
    torch.save(weights, "w.pt")
    assert run(*words)[0] == 0
    torch.save({"head.bias" if k == "last.bias" else k: v for k, v in weights.items()}, "w.pt")
    code, _, err = run(*words)
    assert code == 2
    assert "because it lacks last.bias; the model has no head.bias" in err
    torch.save({**weights, "last.bias": torch.zeros(7)}, "w.pt")
    assert "weight 'last.bias' is [7] in the checkpoint, [2] in the model" in run(*words)[2]


EVIL = r"""
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"\x1b[31mred": nn.Linear(6, 8), "x\u202e": nn.Linear(8, 2)})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x
"""


def test_names_steer_no_terminal(tmp_path: Path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(EVIL)
    words = ["plan", "evil.py:Net", "-i", "f32[2,6]", "-o", "p.json"]
    for given, code in ((["--ratio", "0.5"], 0), (["--ratio", "other=0.5"], 2)):
        done, out, err = run(*words, *given)
        assert done == code
        assert "layers.\\x1b[31mred.weight" in out + err
        assert not {"\x1b", "\u202e"} & {*(out + err)}
