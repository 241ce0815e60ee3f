"""The rooms that mistakes are put into, the tests of each, and which mistakes are none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.mutants.mutant import Mutant
from benchmarks.mutants.tree import ROOT


@dataclass(frozen=True)
class Room:
    """A part of narrows and its tests.

    Attributes:
        files: Globs of its files, from the root.
        without: Globs of files that are not of it.
        tests: Globs of the test files whose tests may find a mistake in it.
        but: Globs of test files that hardly do, and take long.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def paths(self) -> list[str]:
        left = {str(p) for pattern in self.without for p in ROOT.glob(pattern)}
        return [name for name in _found(self.files) if str(ROOT / name) not in left]

    def suites(self) -> list[str]:
        left = set(_found(self.but))
        return [name for name in _found(self.tests) if name not in left]


def _found(patterns: Sequence[str]) -> list[str]:
    found = (p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file())
    return sorted({str(p.relative_to(ROOT)) for p in found if "__pycache__" not in p.parts})


EXACT = ("tests/test_features.py", "tests/test_choices.py", "tests/test_properties.py")
INTEGERS = (
    "tests/test_quantized_properties.py", "tests/ir/test_integer_ops.py",
    "tests/passes/test_quant*.py", "tests/passes/test_levels*.py", "tests/passes/test_parts.py",
    "tests/passes/test_pot_weights.py", "tests/passes/test_rapq.py",
    "tests/passes/test_weight_only.py",
)  # fmt: skip

# A room's samples are calls that the tests make, so they are tests.
ROOMS: dict[str, Room] = {
    "ir": Room(
        ("narrows/ir/**/*.py",),
        (
            "tests/ir/test_*.py", *EXACT, "tests/test_api.py", "tests/test_deep.py",
            "tests/passes/test_*.py", "tests/backends/test_measured.py",
            "tests/frontend/test_norms.py", "tests/frontend/test_second_names.py",
        ),
        ("narrows/ir/integer/**/*.py", "narrows/ir/ops/*samples.py"),
    ),
    "passes": Room(
        ("narrows/passes/**/*.py",),
        (
            "tests/passes/test_*.py", *EXACT, "tests/test_api.py", "tests/test_options.py",
            "tests/cli/test_inspect.py", "tests/ir/test_couplings.py", "tests/ir/test_parcels.py",
        ),
        ("narrows/passes/quant/**/*.py",),
        INTEGERS,
    ),
    "quant": Room(
        ("narrows/ir/integer/**/*.py", "narrows/passes/quant/**/*.py"),
        (
            *INTEGERS, "tests/test_options.py", "tests/cli/test_quantize.py",
            "tests/backends/test_onnx_integer.py", "tests/backends/test_onnx_choices.py",
            "tests/backends/test_onnx_islands.py", "tests/backends/test_wide.py",
            "tests/passes/test_wide.py",
        ),
    ),
    "c": Room(
        ("narrows/backends/c/**/*.py", "narrows/backends/c/kernels/*.c"),
        (
            "tests/backends/test_c*.py", "tests/backends/test_wide.py",
            "tests/test_quantized_properties.py",
        ),
    ),
    # Which sizes are timed, and how often, is left out: no test may depend on it.
    "onnx": Room(
        ("narrows/backends/onnx/**/*.py",),
        (
            "tests/backends/test_onnx*.py", "tests/backends/test_wide.py",
            "tests/backends/test_artifact.py", "tests/ir/test_integer_ops.py",
            "tests/passes/test_weight_only.py", "tests/test_quantized_properties.py",
            "tests/backends/test_measured.py", "tests/backends/test_cost_files.py",
            "tests/backends/test_base.py", "tests/passes/test_latency.py",
            "tests/passes/test_other_costs.py", "tests/passes/test_forms.py",
        ),
        tuple(f"narrows/backends/onnx/{name}.py" for name in ("sweep", "probes", "steady")),
    ),
}  # fmt: skip

# Mistakes that are none: (file, the line as it is then): why nothing can change.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("narrows/ir/ops/lookup.py", "value.const = np.where(same, data[-1].double().numpy(), np.nan)"):
        "where it counts all rows are the same",
    (
        "narrows/ir/couplings.py",
        "self._join(lines.flatten(), np.broadcast_to(lines[:, :1], lines.shape).flatten())",
    ): "channels are joined either way round",
    ("narrows/ir/rewrite/chains.py", "read = rewriter.facts.flows[node].reads[-1]"):
        "what rearranges reads one operand",
    **{("narrows/backends/onnx/tidy.py", line): "these operators have one result" for line in (
        'nodes.append(ir.node("Flatten", [pooled.outputs[-1]], attributes={"axis": 1}))',
        "old, new = node.outputs[-1], nodes[-1].outputs[0]",
        "old, new = node.outputs[0], nodes[-1].outputs[-1]",
    )},
    (
        "narrows/passes/forms/order.py",
        "return np.unique(places) if some(places[1:] < places[:-1]) else places",
    ): "who asks counts a place that stands twice once",
    (
        "narrows/ir/ops/pointwise.py",
        'if is_tensor(n) and n.op == "get_attr" and shape_of(n)[-1] == len(along):',
    ): "a parameter per channel has one axis",
    **{("narrows/passes/forms/order.py", f"return {bounds}"):
        "one column is an interval in every order, and so are all of them"
       for bounds in ("1 <= len(columns) < self.width", "1 < len(columns) <= self.width")},
    ("narrows/backends/c/kernels/binary.c", "m = by < 64 ? b.m >> by : 1;"):
        "a unit behind all digits that are kept, and the rest says already that there is more",
    (
        "narrows/backends/onnx/export.py",
        "self.fake = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=False)",
    ): "all that nodes read is without data already",
    (
        "narrows/backends/onnx/integer/lower.py",
        "dtype = Meta(node).dtype if shape_of(node) is not None else "
        "Meta(node.all_input_nodes[-1]).dtype",
    ): "what has several results and moves codes has one operand",
    (
        "narrows/backends/onnx/integer/qdq.py",
        'narrow = most * shape[axis] < EXACT and most * 2.0 ** args["exponent"] <= 2**23',
    ): "at the bound both forms are exact",
    (
        "narrows/passes/quant/calibrate.py",
        "grid = Grid(_exponent(found, activations, form.operands(node)[-1]))",
    ): "what moves has one operand",
    ("narrows/backends/c/sketch.py", "top = bound << -by if by <= 0 else bound + (1 << by >> 1)"):
        "a shift by nothing leaves the bound in either way",
    (
        "narrows/passes/quant/rapq.py",
        'start = settings.unlearned(method="mse", correct_bias=True)',
    ): "the offsets are set aside, and looked for anew",
    ("narrows/passes/quant/measure.py", "source = rounding[0].all_input_nodes[-1]"):
        "a quantizer has one operand",
    (
        "narrows/passes/quant/measure.py",
        "source = self.fake.tensor(rounded.all_input_nodes[-1]).detach()",
    ): "a quantizer has one operand",
    **{("narrows/passes/quant/trial.py", f"return {product}, None, None, None"):
        "there is one gradient, and one tensor is saved"
       for product in ("grads[-1] * ctx.saved_tensors[0]", "grads[0] * ctx.saved_tensors[-1]")},
    (
        "narrows/ir/snapshot.py",
        "elif not argument.has_default_value() or not _is_default(value, argument.default_value):",
    ): "it is equality",
    (
        "narrows/passes/quant/widen_clips.py",
        "aten.clamp.default, (form.operands(node)[-1], 0.0, top), {},",
    ): "a clip has one operand",
}  # fmt: skip

FAST = re.compile(r"if \(y_step (== [02]|!= 1) && ")  # what is made lies without gaps
SEED = re.compile(r"\b(manual_seed|Random|default_rng)\(\d")


def why_equivalent(mutant: Mutant, text: str) -> str:
    """Return why a change of a file's text is no mistake, or an empty string."""
    line = text.splitlines()[mutant.line - 1]
    if SEED.search(line) and mutant.kind == "constant":
        return "any seed will do"
    if mutant.file.endswith("/page.py") and mutant.kind == "constant":
        return "how a page looks"
    changed = mutant.applied(text.encode()).decode().splitlines()[mutant.line - 1]
    if mutant.file.endswith(".c") and FAST.search(changed):
        return "the loop for any steps does the same"
    return EQUIVALENT.get((mutant.file, changed.strip()), "")
