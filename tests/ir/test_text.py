"""The text form, the diff and the dump folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from narrows.errors import ArtifactError, UsageError
from narrows.ir.diff import diff
from narrows.ir.dump import Dump, split_stage
from narrows.ir.meta import Meta
from narrows.ir.program import Mark, Note, Origin, Program
from narrows.ir.snapshot import Snapshot, fingerprint, snapshot
from narrows.ir.text import columns, render, shape_text, to_text
from tests.builder import Builder, aten, ramp


def network() -> Program:
    """Return a program with all that a line can show."""
    b = Builder((2, 3, 8, 8), (2, 4))
    x = b.relu(b.norm(b.conv(b.inputs[0], "stem.conv", 4, 3), "stem.norm", 4), "stem.relu")
    y = b.conv(x, "block.conv", 4, 2, bias=True, groups=2)
    left, right = (b.call(aten.slice.Tensor, t, 1, 0, 2, name=n) for t, n in ((x, "l"), (y, "r")))
    joined = b.call(aten.cat.default, [left, right], 1, name="join")
    pooled = b.call(aten.mean.dim, joined, [2, 3], name="pool")
    scaled = b.call(aten.mul.Tensor, pooled, b.weight("scale", torch.ones(4), trained=False))
    total = b.call(aten.add.Tensor, scaled, b.inputs[1], alpha=0.5, name="total")
    head = b.call(aten.linear.default, total, b.weight("head.weight", ramp(5, 4)), name="head")
    return b.program(head, pooled, name="sample")


def changed() -> Program:
    """Return the same program as a pass would leave it."""
    program = network().replace(
        history=("prune-channels{plan=p.json}",),
        notes=(Note("block_conv", "padding", "2 channels stay", 2, "net.py:4"),),
        origins={"stem.conv.weight": Origin("stem.conv.weight", (6, 3, 3, 3), (None,) * 4)},
    )
    mark = Mark((2, 6, 8, 8), "coupling stem_conv keeps 4 of 6")
    return program.replace(marks={"stem_conv": mark})


def test_golden(golden):
    golden("text", to_text(network(), weights=True) + "\n" + to_text(changed()))


def test_the_text_is_the_programs_str():
    program = network()
    assert str(program) == to_text(program)


def test_one_line_a_node_and_names_are_stable_under_copies():
    program = network()
    lines = to_text(program).splitlines()
    assert len(lines) == 2 + sum(n.op != "get_attr" for n in program.nodes)
    assert to_text(program.copy()) == to_text(program)


def test_only_some_nodes():
    text = render(snapshot(changed()), only="stem*", weights=True)
    assert "stem_conv" in text
    assert "stem.norm.running_var" in text
    assert "block_conv" not in text
    assert "head.weight" not in text
    assert "2 channels stay" not in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (((2, 3),), "[2,3]"),
        (((2, 3), (0,)), "[b,3]"),
        (((2, 3), (0,), (2, 5)), "[b,5->3]"),
        (((6,), (), (2, 3)), "[2,3]->[6]"),
        (((),), "[]"),
        ((None,), ""),
    ],
)
def test_shapes(arguments: tuple, text: str):
    assert shape_text(*arguments) == text


def test_a_cell_that_is_too_wide_pushes_its_own_line_only():
    assert columns([("a", "b"), ("long", "c"), ("much too long", "d")], (4, 9)) == [
        "a     b",
        "long  c",
        "much too long  d",
    ]


def test_weights_show_a_fingerprint_and_never_data():
    text = to_text(network(), weights=True)
    (line,) = (x for x in text.splitlines() if x.strip().startswith("head.weight"))
    assert re.fullmatch(r"  head\.weight +f32\[5,4\] +[0-9a-f]{8} +-1 +0\.875", line)


@pytest.mark.parametrize(
    ("tensor", "low", "high"),
    [
        (torch.tensor([3.0, -1.5]), -1.5, 3.0),
        (torch.tensor([True, False]), 0.0, 1.0),
        (torch.tensor(7), 7.0, 7.0),
        (torch.zeros(0), None, None),
        (torch.tensor([1 + 2j]), None, None),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 1.0, 2.0),
    ],
)
def test_fingerprints_of_every_kind(tensor: torch.Tensor, low: float | None, high: float | None):
    digest, *range_ = fingerprint(tensor)
    assert re.fullmatch("[0-9a-f]{8}", digest)
    assert range_ == [low, high]
    assert fingerprint(tensor.clone())[0] == digest


def test_a_fingerprint_follows_the_values():
    assert fingerprint(torch.tensor([1.0, 2.0]))[0] != fingerprint(torch.tensor([2.0, 1.0]))[0]
    turned = ramp(2, 3).t()
    assert fingerprint(turned)[0] == fingerprint(turned.contiguous())[0]


def test_a_snapshot_survives_json():
    view = snapshot(changed(), contents=True)
    assert Snapshot.from_json(json.loads(json.dumps(view.to_json()))) == view


# ------------------------------------------------------------------ diff


def test_equal_programs_do_not_differ():
    found = diff(snapshot(network(), contents=True), snapshot(network(), contents=True))
    assert not found
    assert found.to_text().endswith("no difference\n")
    assert found.to_json()["equal"]


def test_golden_diff(golden):
    program = network()
    new = program.copy()
    norm, relu = new.node("stem_norm"), new.node("stem_relu")
    norm.replace_all_uses_with(norm.args[0])
    new.graph.erase_node(norm)
    with new.graph.inserting_after(relu):
        extra = new.graph.call_function(aten.tanh.default, (relu,))
    Meta(extra).shape, Meta(extra).dtype = Meta(relu).shape, torch.float32
    left = new.node("l")
    left.args = (left.args[0], 1, 0, 1)
    Meta(left).shape = (2, 1, 8, 8)
    weights = dict(program.weights)
    weights["head.weight"] = weights["head.weight"] * 2
    weights["scale"] = torch.ones(1, 4)
    weights["new"] = weights.pop("stem.norm.bias")
    found = diff(
        snapshot(program, contents=True), snapshot(new.replace(weights=weights), contents=True)
    )
    golden("diff", found.to_text())
    data = found.to_json()
    assert [n["name"] for n in data["removed"]] == ["stem_norm"]
    assert [n["name"] for n in data["added"]] == ["tanh_default"]
    assert {c["name"] for c in data["changed"]} == {"stem_relu", "l", "mul_tensor"}
    assert data["changed_weights"][0]["fields"]["shape"] == ("f32[4]", "f32[1,4]")


def renamed(program: Program, names: dict[str, str], *, forget: bool = False) -> Snapshot:
    view = snapshot(program).to_json()
    text = json.dumps(view)
    for old, new in names.items():
        text = re.sub(rf"\b{old}\b", new, text)
    data = json.loads(text)
    for node in data["nodes"]:
        if forget:
            node.pop("source", None)
            node.pop("module", None)
    return Snapshot.from_json(data)


def test_a_renamed_node_is_matched_by_its_provenance():
    old = snapshot(network())
    found = diff(old, renamed(network(), {"block_conv": "other"}))
    assert not found.added
    assert not found.removed
    assert [(c.old_name, c.name) for c in found.changed] == [("block_conv", "other")]


def test_without_provenance_a_renamed_node_is_matched_by_its_wiring():
    old = renamed(network(), {}, forget=True)
    new = renamed(network(), {"block_conv": "p", "r": "q", "join": "s"}, forget=True)
    found = diff(old, new)
    assert not found.added
    assert {c.old_name: c.name for c in found.changed} == {"block_conv": "p", "r": "q", "join": "s"}


# ------------------------------------------------------------------ dumps


def make_dump(path: Path) -> Dump:
    dump = Dump.create(path)
    dump.add("capture", snapshot(network(), contents=True), spelling="capture")
    dump.add("prune-channels", snapshot(changed(), contents=True))
    dump.add("prune-channels", snapshot(changed().replace(name="again"), contents=True))
    return dump


def test_a_dump_reads_back(tmp_path: Path):
    made = make_dump(tmp_path / "d")
    dump = Dump.open(tmp_path / "d")
    assert dump.stages == made.stages
    assert dump.snapshot("0") == snapshot(network(), contents=True)
    assert dump.snapshot("capture") == dump.snapshot("0")
    assert dump.snapshot("prune-channels").name == "again"
    assert dump.snapshot().name == "again"
    assert (tmp_path / "d" / "000_capture.txt").read_text() == to_text(network(), weights=True)


def test_a_dump_carries_the_identity_of_its_artifact(tmp_path: Path):
    made = make_dump(tmp_path / "d")
    assert Dump.open(tmp_path / "d").artifact == ""
    made.seal("0123")
    assert Dump.open(tmp_path / "d").artifact == "0123"
    made.remove()
    assert not (tmp_path / "d").exists()


def test_an_unknown_pass_is_refused_with_those_there_are(tmp_path: Path):
    make_dump(tmp_path / "d")
    with pytest.raises(UsageError) as caught:
        Dump.open(tmp_path / "d").snapshot("prune-channel")
    assert str(caught.value) == (
        "the dump has no pass 'prune-channel'\n"
        f"  at {tmp_path / 'd'}\n"
        "  because it holds 0 capture, 1 prune-channels, 2 prune-channels\n"
        "  try: did you mean 'prune-channels'?"
    )
    with pytest.raises(UsageError, match="no pass '7'"):
        Dump.open(tmp_path / "d").snapshot("7")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "there is no dump here"),
        ("{", "the dump's index cannot be read"),
        ("[]", "this index was not written by narrows"),
        (
            '{"format": "narrows-dump", "version": 99}',
            "the dump has version 99, this narrows reads 1",
        ),
        ('{"format": "narrows-dump", "version": 1}', "the dump's index is incomplete"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: str | None, message: str):
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(ArtifactError, match=message):
        Dump.open(tmp_path)


def test_a_damaged_program_is_refused(tmp_path: Path):
    make_dump(tmp_path / "d")
    for damage in (
        "{",
        "{}",
        '{"name": 1, "history": [], "nodes": [{}], "weights": [], "notes": []}',
    ):
        (tmp_path / "d" / "000_capture.json").write_text(damage)
        with pytest.raises(ArtifactError, match=r"cannot read 000_capture\.json"):
            Dump.open(tmp_path / "d").snapshot("0")


def test_a_dump_without_a_program_says_so(tmp_path: Path):
    Dump.create(tmp_path / "d")
    with pytest.raises(ArtifactError, match="holds no program yet"):
        Dump.open(tmp_path / "d").snapshot()


def test_an_interrupted_write_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dump = make_dump(tmp_path / "d")

    def interrupt(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dump.add("late", snapshot(network()))
    assert not [p for p in (tmp_path / "d").iterdir() if "late" in p.name or "part" in p.name]
    assert len(Dump.open(tmp_path / "d").stages) == 3


def test_folder_and_pass_are_split_at_the_last_at(tmp_path: Path):
    assert split_stage("out@fold-batch-norm") == ("out", "fold-batch-norm")
    assert split_stage("out") == ("out", "")
    assert split_stage("a@b/out@2") == ("a@b/out", "2")
    (tmp_path / "a@b").mkdir()
    assert split_stage(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), "")
