"""Reconstruction: where blocks end, what is learned, and what becomes of it afterwards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.errors import FidelityError, PlanError, UsageError
from narrows.ir.compare import relative_error
from narrows.ir.integer.codes import WeightCodes
from narrows.ir.integer.library import weight_codes
from narrows.ir.program import Program
from narrows.passes.quant import rapq as module
from narrows.passes.quant import reconstruct
from narrows.passes.quant.blocks import cut
from narrows.passes.quant.calibrate import calibrate
from narrows.passes.quant.exactness import assert_exact
from narrows.passes.quant.learning import Learning
from narrows.passes.quant.options import Quantization
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.quantization import Quantized, preparation
from narrows.passes.quant.rapq import Reconstruction
from narrows.passes.quant.survey import survey
from narrows.passes.quant.trial import Trial
from tests.builder import Builder, aten


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A stem, an inverted residual, a residual block with a gate, a fork that is joined, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.deep = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.thin = nn.Conv2d(16, 8, 1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.thin(F.relu6(self.deep(F.relu6(self.wide(x))))) + x
        y = self.two(F.relu(self.one(x)))
        x = F.relu(x + y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1))))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(x.mean((2, 3)))


@cache
def captured() -> Program:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.train()(images(32, 3, 8, 8))
    return narrows.capture(net.eval(), (images(2, 3, 8, 8),), name="net")


def data() -> list[Tensor]:
    return list(images(32, 3, 8, 8, seed=2).split(16))


def reconstructed(program: Program | None = None, **options: Any) -> Quantized:
    given = {"weights": 3, "activations": 4, "budget": 60, **options}
    return narrows.quantize(program or captured(), data(), method="rapq", **given)


@cache
def made() -> Quantized:
    return reconstructed(budget=20)


def reconstruction(learning: Learning) -> Reconstruction:
    program = captured()
    settings = Quantization(weights=3, activations=4, method="rapq")
    prepared = preparation(4).run(program, []).program
    plan = calibrate(prepared, data(), dataclasses.replace(settings, method="mse"))
    return Reconstruction(program, prepared, data(), plan, settings, learning)


# ------------------------------------------------------------------ blocks


def ends(model: nn.Module, *shape: int) -> list[str]:
    program = narrows.capture(model.eval(), (images(*shape),))
    prepared = preparation().run(program, []).program
    return [n.name for n in cut(prepared, survey(prepared))]


def test_blocks_end_where_the_graph_is_joined() -> None:
    assert ends(Net(), 2, 3, 8, 8) == ["relu", "add", "relu_2", "cat", "head"]


def test_attention_and_feed_forward_are_two_blocks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Linear(6, 8), layer

        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x)
            z = self.layer.norm1(y)
            y = y + self.layer.self_attn(z, z, z, need_weights=False)[0]
            return y + self.layer.linear2(F.relu(self.layer.linear1(self.layer.norm2(y))))

    found = ends(Two(), 2, 5, 6)
    assert len(found) == 3
    assert found[1:] == ["add", "add_1"]


def test_chains_are_taken_three_at_a_time_and_large_regions_by_the_layer() -> None:
    chain = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(5)))
    assert ends(chain, 2, 4, 5, 5) == ["_2", "_4"]

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(9))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([b(x) for b in self.branches], 1)

    assert len(ends(Wide(), 2, 4, 5, 5)) == 9


# ------------------------------------------------------------------ what is learned


def test_reconstruction_comes_closer_than_rounding() -> None:
    program, x = captured(), images(32, 3, 8, 8, seed=3)
    plain = narrows.quantize(program, data(), weights=3, activations=4)
    learned = reconstructed(program, budget=200)
    expected = program(x)
    errors = [float((q.program(x) - expected).square().mean()) for q in (plain, learned)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("bits", [(6, 6), (4, 4), (3, 3), (2, 4)])
def test_every_code_is_next_to_its_weight(bits: tuple[int, int]) -> None:
    found = reconstructed(weights=bits[0], activations=bits[1], rounding="half_up", budget=10)
    plan, changed = found.plan, 0
    assert plan.codes.keys() == plan.weights.keys()
    for name, grid in plan.weights.items():
        assert grid.bits == (8 if name in ("stem.weight", "head.weight") else bits[0])
        weight, codes = found.prepared.weights[name], plan.codes[name].tensor().double()
        scale = torch.exp2(torch.tensor(grid.exponents, dtype=torch.float64))
        steps = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
        near = steps.clamp(-grid.high, grid.high)
        assert bool(((codes - near).abs() < 1).all())
        plain = weight_codes(weight, grid.exponents, 0, -grid.high, grid.high)
        changed += int((codes != plain).sum())
    assert changed > 0


def test_biases_are_learned_unless_told_otherwise() -> None:
    assert made().plan.offsets
    assert not reconstructed(budget=20, correct_bias=False).plan.offsets


def test_a_trial_computes_what_the_fake_quantized_program_does() -> None:
    work = reconstruction(Learning(budget=20))
    plan = work.run()
    fake = narrows.quantize(captured(), plan=plan, activations=4).fake
    trial, x = work.trial, images(8, 3, 8, 8)
    whole, holder = trial.span(trial.output, []), trial.named["x"]
    assert torch.equal(trial.run(whole, {holder: x}, "hard")[0], fake(x))
    assert relative_error(trial.run(whole, {holder: x}, "float")[0], work.prepared(x)) < 1e-6


def test_softmax_and_layer_norm_in_a_trial() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.attention(y, y, y, need_weights=False)[0]

    program = narrows.capture(Attention().eval(), (images(4, 2, 8),), dynamic_batch=False)
    batches = [(images(4, 2, 8, seed=i),) for i in range(3)]
    found = narrows.quantize(program, batches, method="rapq", weights=4, budget=12)
    assert len(found.plan.codes) == 2
    # A step that is no power of two, on either side: what integers would give is not known then.
    trial = Trial(found.prepared, found.plan, survey(found.prepared), torch.device("cpu"))
    whole, x = trial.span(trial.output, []), {trial.named["x"]: batches[0][0]}
    for site in trial.sites.values():
        step, site.step = site.step, site.step * 1.25
        assert relative_error(trial.run(whole, x, "hard")[0], trial.run(whole, x, "float")[0]) < 0.3
        site.step = step


def test_the_power_of_a_loss_comes_from_the_norms() -> None:
    found = module._norm_powers(captured())
    assert found == {"stem.weight": pytest.approx(1 + 2 / (1 + 2.718281828 ** (-7 / 8)))}
    normed = reconstructed(budget=20, loss="norm").plan
    assert normed.codes["stem.weight"] != made().plan.codes["stem.weight"]


def test_the_same_seed_gives_the_same_plan() -> None:
    assert reconstructed(budget=20, seed=0).plan == made().plan
    assert reconstructed(budget=20, seed=1).plan != made().plan


def test_a_time_is_a_budget(monkeypatch) -> None:
    counts = []
    learn = module.learn
    monkeypatch.setattr(module, "learn", lambda *a, **k: counts.append(learn(*a, **k)))
    reconstructed(budget="0.5s", check=False)
    assert len(counts) == 5
    assert all(count >= 8 for count in counts)


def test_blocks_share_a_time(monkeypatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(module, "learn", lambda *_, seconds, **__: given.append(seconds))
    reconstructed(budget="1000000s", check=False)  # nobody learns: what is left is all of it
    assert len(given) == 5
    assert 0 < given[0] < 0.9 * given[-1]
    assert given[-1] == pytest.approx(module.LEARNING * 1e6, rel=0.01)


def test_no_iterations_still_choose_exponents() -> None:
    plan = reconstructed(budget=0).plan
    assert not plan.codes
    start = narrows.quantize(captured(), data(), weights=3, activations=4).plan
    assert (plan.weights, plan.activations) != (start.weights, start.activations)


def test_a_channel_of_nearly_nothing_has_room_beside_every_grid() -> None:
    """Its step is as fine as can be shifted back, until the result's step grows after all."""
    program = captured()
    weights = {n: w.clone() for n, w in program.weights.items()}
    weights["stem.weight"][3] *= 1e-12
    for name in ("stem.bias", "norm.bias", "norm.running_mean"):
        weights[name][3] = 0.0
    program = program.replace(weights=weights)
    settings = Quantization(weights=3, activations=4, method="rapq")
    prepared = preparation(4).run(program, []).program
    plan = calibrate(prepared, data(), dataclasses.replace(settings, method="mse"))
    work = Reconstruction(program, prepared, data(), plan, settings, Learning(budget=4))
    work.reconstruct()
    before = work.trial.kernels[work.trial.named["stem"]].steps.clone()
    for site in work.trial.sites.values():
        site.step *= 1.0 if site.name == "x" else 16.0
    found = work.result()
    assert work.trial.kernels[work.trial.named["stem"]].steps[3] > before[3]
    quantized = narrows.quantize(program, plan=found)
    assert_exact(quantized.fake, quantized.program, data()[0])


def test_few_bits_are_for_what_is_multiplied() -> None:
    plan = narrows.quantize(captured(), data(), weights=4, activations=4, check=False).plan
    narrow = {name for name, grid in plan.activations.items() if grid.bits == 4}
    read = {"relu", "relu6", "relu6_1", "add", "relu_1", "adaptive_avg_pool2d", "relu_2"}
    assert narrow == read
    b = Builder((2, 3, 6, 6))
    x = b.norm(b.relu(b.conv(b.inputs[0], "first", 4, 3)), "norm", 4)
    x = b.conv(b.relu(b.conv(b.relu(x), "middle", 4, 4)), "last", 4, 4)
    program = b.program(b.call(aten.adaptive_avg_pool2d.default, x, [2, 2]))
    plan = narrows.quantize(program, [program.examples[0]], weights=4, activations=4).plan
    bits = {name: grid.bits for name, grid in plan.weights.items()}
    # The last layer is the last, although its result is averaged before it is put out.
    assert bits == {"first.weight": 8, "norm.scale": 8, "middle.weight": 4, "last.weight": 8}


# ------------------------------------------------------------------ going on


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch) -> None:
    whole = made().plan
    path = tmp_path / "state.pt"
    learn, calls = module.learn, []

    def stops(*args: Any, **kwargs: Any) -> int:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)

    monkeypatch.setattr(module, "learn", stops)
    with pytest.raises(KeyboardInterrupt):
        reconstructed(budget=20, checkpoint=path)
    assert reconstructed(budget=20, checkpoint=path).plan == whole
    assert len(calls) == 6  # two blocks, one in vain, and the three that were left
    assert reconstructed(budget=20, checkpoint=path).plan == whole
    assert len(calls) == 6
    finished = reconstruction(Learning(budget=20, checkpoint=path))
    assert finished._resume() == len(finished.spans) + 1  # all blocks, and what comes after them
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda s: s["kernels"].pop("head.weight"), "the weights of another network"),
        (lambda s: s["sites"].popitem(), "the activations of another network"),
        (lambda s: s["kernels"]["head.weight"].pop("shift"), "it lacks something of head.weight"),
        (lambda s: s["kernels"]["head.weight"].update(steps=torch.ones(2)), "steps .* do not fit"),
        (lambda s: s["kernels"]["head.weight"].update(steps=None), "steps .* do not fit"),
        (lambda s: s["kernels"]["head.weight"]["steps"][:1].fill_(torch.inf), "steps .* out of"),
        (lambda s: s["kernels"]["head.weight"]["codes"][:1].fill_(-128), "codes .* out of range"),
    ],
)
def test_damaged_checkpoints_are_refused(damage: Callable, why: str, tmp_path: Path) -> None:
    work = reconstruction(Learning(checkpoint=tmp_path / "state.pt"))
    for kernel in work.trial.kernels.values():
        kernel.codes = torch.zeros_like(kernel.weight)
    work._save(1)
    assert work._resume() == 1
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(UsageError, match=f"is damaged.*\\n.*{why}"):
        work._resume()


def test_checkpoints_of_other_runs_are_refused(tmp_path) -> None:
    path = tmp_path / "state.pt"
    reconstructed(budget=0, checkpoint=path)
    with pytest.raises(UsageError, match="is of another run"):
        reconstructed(budget=0, checkpoint=path, weights=4)
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="is not a checkpoint"):
        reconstructed(budget=0, checkpoint=path)
    with pytest.raises(UsageError, match="cannot write"):
        reconstructed(budget=0, checkpoint=Path(tmp_path / "missing" / "state.pt"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": -1}, "is negative"),
        ({"budget": 1.5}, "a number of iterations or a time"),
        ({"budget": "soon"}, "'soon' is no time"),
        ({"loss": "l3"}, "loss is l2 or norm"),
        ({"method": "mse", "budget": 10}, "budget is an option of method='rapq'"),
        ({"method": "mse", "budget": None, "checkpoint": "x"}, "checkpoint is an option of"),
        ({"calibration": None}, "there is no calibration data"),
        ({"calibration": []}, "there is no calibration data"),
    ],
)
def test_bad_requests(options: dict[str, Any], text: str) -> None:
    given = {"calibration": data(), "method": "rapq", "budget": 10, **options}
    with pytest.raises(UsageError, match=text):
        narrows.quantize(captured(), given.pop("calibration"), **given)


# ------------------------------------------------------------------ the plan afterwards


def test_codes_are_saved(tmp_path) -> None:
    path = made().plan.save(tmp_path / "q.json")
    assert QuantPlan.load(path) == made().plan
    again = narrows.quantize(captured(), plan=path)
    x = images(8, 3, 8, 8)
    assert torch.equal(again.program(x), made().program(x))
    assert json.loads(path.read_text())["version"] == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.update(codes="!"),
        lambda c: c.update(codes="AAAA"),
        lambda c: c.update(shape=[8, 3, 3, 4]),
        lambda c: c.update(shape=[8, 3, 3, -3]),
        lambda c: c.pop("codes"),
    ],
)
def test_damaged_codes_are_refused(damage) -> None:
    codes = WeightCodes.of(torch.arange(216).reshape(8, 3, 3, 3) % 7 - 3)
    assert WeightCodes.from_json(codes.to_json()) == codes
    data = QuantPlan({}, {}, codes={"w": codes}).to_json()
    damage(data["codes"]["w"])
    with pytest.raises(PlanError, match="is damaged"):
        QuantPlan.from_json(data)


def test_codes_follow_their_channels() -> None:
    whole = made()
    kept = [0, 2, 3, 7]
    plan = narrows.plan(whole.prepared, keep_outputs={"one.weight": kept})
    pruned = narrows.apply(whole.prepared, plan)
    followed = whole.plan.follow(pruned)
    for name, index in (("one.weight", (kept,)), ("two.weight", (slice(None), kept))):
        expected = whole.plan.codes[name].tensor()[index]
        assert torch.equal(followed.codes[name].tensor(), expected)
    narrows.quantize(pruned, plan=followed)


def test_codes_of_other_weights_are_refused() -> None:
    weights = {**captured().weights, "one.weight": captured().weights["one.weight"] + 1}
    with pytest.raises(PlanError, match="are of other weights"):
        narrows.quantize(captured().replace(weights=weights), plan=made().plan)


def test_a_weight_that_is_read_as_it_is_stays() -> None:
    b = Builder((2, 4, 4))
    w = b.weight("tied", images(4, 4))
    y = b.call(aten.linear.default, b.inputs[0], w, name="layer")
    program = b.program(b.call(aten.add.Tensor, y, w))
    items = [images(16, 4, 4, seed=i) for i in range(2)]
    found = narrows.quantize(program, items, method="rapq", weights=3, first_last=None, budget=20)
    assert torch.equal(found.fake.weights["tied"], program.weights["tied"])
    assert not torch.equal(found.fake.weights["tied_codes"], program.weights["tied"])


def test_the_report_is_of_the_learned_codes() -> None:
    def told(plan: QuantPlan) -> dict[str, Any]:
        quantized = narrows.quantize(captured(), plan=plan)
        return {m.name: m for m in quantized.report(data()).tensors if m.kind == "weight"}

    plan = made().plan
    learned = told(plan)
    nearest = told(dataclasses.replace(plan, codes={}))
    assert learned["two.weight"].sqnr < nearest["two.weight"].sqnr  # no rounding is closer
    assert learned["two.weight"].gain != 0


def test_what_is_not_exact_is_refused() -> None:
    fake, integers, x = made().fake, made().program, data()[0]
    assert_exact(fake, integers, x)
    wrong = integers.copy()
    wrong.weights["head.weight"] = wrong.weights["head.weight"].clone()
    wrong.weights["head.weight"][0] += 1
    with pytest.raises(FidelityError, match=r"[1-9]\d* of 80 elements of output 0 differ"):
        assert_exact(fake, wrong, x)
    odd = fake.copy()
    node = next(n for n in odd.nodes if n.target is torch.ops.narrows.fake_quantize.default)
    node.args = (*node.args[:2], 7, *node.args[3:])
    with pytest.raises(FidelityError, match="neither 0 nor 128"):
        assert_exact(odd, integers, x)


def test_straight_through_where_nothing_is_clipped() -> None:
    work = reconstruction(Learning())
    trial: Trial = work.trial
    site = next(iter(trial.sites.values()))
    site.step, site.low, site.high = 0.5, -2, 1
    x = torch.tensor([-3.0, -1.1, -0.2, 0.3, 0.9], requires_grad=True)
    from narrows.passes.quant.trial import _Through

    y = _Through.apply(x, site, "half_even", torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    y.sum().backward()
    assert y.tolist() == pytest.approx([-1.0, -1.0, 0.0, 0.5, 0.9])
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_cuda_computes_a_block_in_full_precision() -> None:
    library = torch.backends.cuda.matmul  # it can be asked without such a device
    before, library.allow_tf32 = library.allow_tf32, True
    try:
        with module._full_precision(torch.device("cpu")):
            assert library.allow_tf32
        with module._full_precision(torch.device("cuda")):
            assert not library.allow_tf32
        assert library.allow_tf32
    finally:
        library.allow_tf32 = before


def test_steps_of_weights_and_activations_are_chosen_twice(monkeypatch: pytest.MonkeyPatch):
    """Each depends on the other, so once is too little; more would not pay."""
    losses = iter([8.0, 4.0, 2.0, 1.0])
    tried: list[int] = []

    def closest(*_: object) -> int:
        tried.append(len(tried) + 1)
        return tried[-1]

    monkeypatch.setattr(reconstruct, "loss_of", lambda *_: next(losses))
    monkeypatch.setattr(reconstruct, "_closest", closest)
    kernel: Any = SimpleNamespace(steps=0)
    nothing: Any = None
    block = reconstruct.Block(nothing, [], [], [], kernels=[kernel])
    found = reconstruct.choose_steps(nothing, block, [0], reconstruct.POWERS_OF_TWO)
    assert (found, tried, kernel.steps) == (2.0, [1, 2], 2)
