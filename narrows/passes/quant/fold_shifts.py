"""`FoldShifts`: a fake-quantized program becomes a program of integers and shifts.

Every multiplication by a scale ``2**-e`` is a shift by whole numbers that compose: a layer whose
operand, weight and result have the exponents ``x``, ``w`` and ``y`` ends in one shift by
``x + w - y``. Codes that are only moved keep their grid, so shifts cancel across pooling, flatten
and concatenation. Clips are absorbed into the bounds of the codes, biases into the accumulator.

The result runs (``program(*inputs)``) and is the reference for every backend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.errors import PassError
from narrows.ir.editing import infer_shapes
from narrows.ir.integer.bounds import EXACT, SAFE, SHIFTS, WIDE_SAFE, accumulator_bound
from narrows.ir.integer.grid import HALF_EVEN, Grid, WeightGrid
from narrows.ir.integer.library import weight_codes
from narrows.ir.meta import Meta, copy_meta, where
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import Clip, IntegerForm, LayerWeights, Moves, Settled, Tests
from narrows.ir.ops.integer_choices import flags
from narrows.ir.program import Note, Program
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.quant.islands import widened

ops: Any = torch.ops.narrows


@dataclass(frozen=True)
class FoldShifts(Pass):
    """Turns fake-quantized operators into integer operators, shifts and clips.

    An operator that is not between two quantizers stays floating-point, as an island: its operands
    are dequantized, and its result is quantized where codes are needed.
    """

    name: ClassVar[str] = "fold-shifts"
    fidelity: ClassVar[Fidelity] = Fidelity.EQUAL

    def run(self, program: Program) -> PassResult:
        """Return the integer program.

        Raises:
            PassError: An accumulator could exceed 32 bits, or a shift is out of range; the message
                names the layer.
        """
        if not any(n.target is ops.fake_quantize.default for n in program.graph.nodes):
            return PassResult(program, False)
        folder = _Folder(program)
        return PassResult(folder.run(), True, tuple(folder.notes))

    def reference(self, program: Program) -> Program:
        """Return the fake-quantized program in float64, which holds every accumulator exactly.

        Its islands stay in their own dtype, in which the integer program computes them, too.
        """
        return widened(program, {c for n in program.graph.nodes for c in _chain(n)})


class _Folder:
    """Builds the integer program; `_Folder` is what `IntegerForm.emit` calls a ``Fold``."""

    def __init__(self, program: Program) -> None:
        self.old = program
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}  # floats, and what only moves codes
        self.grids: dict[fx.Node, Grid] = {}  # of the nodes of the new program
        self.floats: dict[fx.Node, fx.Node] = {}  # new codes, dequantized
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}  # those, in another dtype
        self.weights: dict[str, Tensor] = {}
        self.constants: dict[str, fx.Node] = {}
        self.notes: list[Note] = []
        self.source: fx.Node | None = None

    def run(self) -> Program:
        waiting = {c for n in self.old.graph.nodes for c in _chain(n)}
        for node in self.old.graph.nodes:
            self.source = node
            if node.op == "output":
                self.graph.output(map_arg(node.args[0], self._float))
            elif node.op == "placeholder":
                made = self.graph.create_node("placeholder", node.target, name=node.name)
                self.made[node] = self._like(node, made)
            elif node.op == "get_attr" or node in waiting:
                continue  # made when it is read; by the quantizer that it ends in
            elif node.target is ops.fake_quantize.default:
                self.made[node] = self._settle(node)
            elif node.target is ops.scale_parts.default:
                self.made[node] = self._scaled(node)
            elif node.target is not ops.fake_quantize_weight.default:
                made = self._move(node) or self._test(node)
                self.made[node] = made or self._island(node)
        return self._program()

    def _program(self) -> Program:
        dead = True
        while dead:  # a float that nothing reads unrounded any more
            dead = [
                n for n in reversed(self.graph.nodes)
                if not n.users and n.op in ("call_function", "get_attr")
            ]  # fmt: skip
            for node in dead:
                self.graph.erase_node(node)
        read = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        weights = {n: t for n, t in self.weights.items() if n in read}
        kept = {a: n for a, n in self.old.aliases.items() if n in weights and a not in weights}
        program = self.old.copy(
            graph=self.graph,
            weights=weights,
            aliases=kept,
            buffers=frozenset(
                n for n in weights if n not in self.old.weights or n in self.old.buffers
            ),
            stored=self.old.stored & weights.keys(),
            origins={n: o for n, o in self.old.origins.items() if n in weights},
        )
        infer_shapes(program)
        return program.seal()

    # ------------------------------------------------------------------ nodes

    def _call(self, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        assert self.source is not None
        copy_meta(self.source, node)
        return node

    def _like(self, old: fx.Node, new: fx.Node) -> fx.Node:
        copy_meta(old, new)
        for key in ("shape", "dtype", "size"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
        return new

    def _settle(self, quantizer: fx.Node) -> fx.Node:
        """Return the codes of what a quantizer rounds."""
        args = arguments(quantizer)
        source, rounding = args["x"], args["rounding"]
        grid = _grid(args)
        chain = _chain(quantizer)
        node, clips = (chain[0], chain[1:]) if chain else (source, [])
        low, high = grid.low, grid.high
        for clip in clips:
            low, high = _clipped(clip, grid, rounding, low, high)
        settled = Settled(grid, low, high, rounding)
        form = table.integer_form(node) if chain else None
        self.source = node
        if isinstance(form, Clip):
            low, high = _clipped(node, grid, rounding, low, high)
            settled = Settled(grid, low, high, rounding)
        if form is not None:
            target, call = form.emit(self, node, settled)
            how = _rounding(target, rounding) | _width(target, grid)
            made = self._call(target, call, how, node.name)
            self._check_shifts(node, made)
        elif (codes := self._known(node)) is not None:
            have = self.grids[codes]
            shift = have.exponent - grid.exponent
            call = (codes, shift, have.zero, *settled.tail)
            target = ops.rescale.default
            how = _rounding(target, rounding) | _width(target, grid)
            made = self._call(target, call, how, quantizer.name)
        elif Meta(node).dtype is torch.bool:
            target, call = flags(self, node, node, settled)
            made = self._call(target, call, {}, quantizer.name)
        elif node.op == "get_attr":
            call = (grid.exponent, grid.zero, low, high)
            tensor = ops.quantize.default(self.old.tensor(node).detach(), *call, wide=grid.wide)
            made = self.constant(str(node.target), tensor)
        else:
            call = (self._float(node), grid.exponent, grid.zero, low, high)
            target = ops.quantize.default
            how = _rounding(target, rounding) | _width(target, grid)
            made = self._call(target, call, how, quantizer.name)
        return self._on(made, grid)

    def _on(self, node: fx.Node, grid: Grid) -> fx.Node:
        self.grids[node] = Meta(node).grid = grid
        return node

    def _known(self, old: fx.Node) -> fx.Node | None:
        """Return the codes of a node of the old program, if it has any."""
        made = self.made.get(old)
        return made if made in self.grids else None

    def _move(self, node: fx.Node) -> fx.Node | None:
        """Return the operator itself on codes, where it only moves them."""
        form = table.integer_form(node)
        if not isinstance(form, Moves) or form.obstacle(node):
            return None
        codes = self._known(form.operands(node)[0])
        if codes is None:
            return None
        have = self.grids[codes]
        grid = form.regrid(node, have)
        if grid != have:  # the same codes under another exponent
            made = self._call(dialect.ALIAS, (codes,), {}, node.name)
            return self._on(made, grid)
        call = form.move(self, node, codes, have)
        if call is not None:
            return self._on(self._call(*call, {}, node.name), have)
        args, kwargs = map_arg((node.args, node.kwargs), self._operand)
        return self._on(self._call(node.target, args, kwargs, node.name), have)

    def _test(self, node: fx.Node) -> fx.Node | None:
        """Return the truth values of a question that codes answer."""
        form = table.integer_form(node)
        if not isinstance(form, Tests) or form.obstacle(node) or not _on_codes(form, node):
            return None
        made = self._call(*form.test(self, node), {}, node.name)
        self._check_shifts(node, made)
        return made

    def _operand(self, old: fx.Node) -> fx.Node:
        codes = self._known(old)
        return codes if codes is not None else self._float(old)

    def _island(self, node: fx.Node) -> fx.Node:
        args, kwargs = map_arg((node.args, node.kwargs), self._in_kind)
        made = self._call(node.target, args, kwargs, node.name)
        return self._like(node, made)

    def _scaled(self, node: fx.Node) -> fx.Node:
        """Return the numbers of parts that lie on one grid under powers of their own."""
        args = arguments(node)
        codes = self._known(args["x"])
        if codes is None:
            return self._island(node)
        grid = self.grids[codes]
        call = (codes, grid.exponent, grid.zero, args["powers"], args["axis"])
        return self._call(ops.dequantize.default, call, {}, node.name)

    def _in_kind(self, old: fx.Node) -> fx.Node:
        """Return the node of an operand in the dtype that the program computes in."""
        made, dtype = self._float(old), Meta(old).dtype
        if made.target is not ops.dequantize.default or dtype in (None, torch.float32):
            return made
        if (made, dtype) not in self.casts:
            cast = self._call(dialect.CAST, (made, dtype), {}, f"{made.name}_cast")
            self.casts[made, dtype] = cast
        return self.casts[made, dtype]

    def _float(self, old: fx.Node) -> fx.Node:
        """Return the node of an operand in floating-point."""
        if old.op == "get_attr":
            return self.constant(str(old.target), self.old.tensor(old))
        if old.target is ops.fake_quantize_weight.default and old not in self.made:
            with torch.no_grad():
                source = arguments(old)["x"]
                rounded = ops.fake_quantize_weight.default
                tensor = rounded(self.old.tensor(source), *old.args[1:])
            self.made[old] = self.constant(str(source.target), tensor)
        made = self.made[old]
        if made not in self.grids:
            return made
        if made not in self.floats:
            grid = self.grids[made]
            call = (made, grid.exponent, grid.zero)
            self.floats[made] = self._call(ops.dequantize.default, call, {}, f"{made.name}_float")
            copy_meta(old, self.floats[made])
        return self.floats[made]

    # ------------------------------------------------------------------ what forms ask for

    def codes(self, operand: fx.Node) -> tuple[fx.Node, Grid]:
        """Return the node of an operand's codes, and their grid."""
        made = self._known(operand)
        assert made is not None, operand
        return made, self.grids[made]

    def table(self, node: fx.Node, made: Tensor) -> fx.Node:
        """Return the node of a function's table: the plan's, or the one made here."""
        held = Meta(node).table
        if held is not None:
            held = held.to(made.dtype)
            if held.shape != made.shape or int((held.long() - made.long()).abs().max()) > 1:
                raise PassError(
                    f"the plan's table of {node.name} is of another function",
                    where=where(node),
                    why="they differ by more than a step, so it is another model's",
                    hint="quantize this model with narrows.quantize, or use plan.bare()",
                )
        return self.constant(f"{node.name}.table", made if held is None else held)

    def truth(self, operand: fx.Node) -> fx.Node:
        """Return the node of an operand that holds truth values."""
        return self._float(operand)

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        """Return the node of a constant under a name, or under a new one if that is taken."""
        base, count = name, 1
        while name in self.weights:
            held = self.weights[name]
            if held is tensor or (held.dtype == tensor.dtype and torch.equal(held, tensor)):
                return self.constants[name]
            name, count = f"{base}_{count}", count + 1
        self.weights[name] = tensor
        node = self.graph.get_attr(name)
        Meta(node).shape, Meta(node).dtype = tuple(tensor.shape), tensor.dtype
        self.constants[name] = node
        return node

    def float_weight(self, node: fx.Node | None) -> Tensor | None:
        """Return the tensor behind a ``get_attr`` node of the float program."""
        return None if node is None else self.old.tensor(node)

    def layer(
        self, node: fx.Node, weights: LayerWeights, x: Grid, out: Grid
    ) -> tuple[fx.Node, fx.Node | None, list[int]]:
        """Return the nodes of a layer's int8 weight and int32 bias, and the shifts it ends in."""
        name, codes, exponents = self._codes_of(weights.weight)
        grid = WeightGrid.read(*weights.weight.args[1:])  # type: ignore[arg-type]
        shifts = [x.exponent + e - out.exponent for e in exponents]
        bias_name, bias = "", None
        if weights.bias is not None:
            bias_name, bias, scales = self._codes_of(weights.bias)
            if scales != [x.exponent + e for e in exponents]:
                raise PassError(
                    "a bias is not at the exponent of its accumulator",
                    where=where(node),
                    hint="quantize the float program anew, with the pass quantize",
                )
        bound = int(accumulator_bound(codes, bias, x, weights.axis, weights.groups).max())
        self._check_bound(node, bound << max(-min(shifts), 0) if x.wide else bound, x.wide)
        if weights.transposed:
            codes, grid = codes.t().contiguous(), replace(grid, axis=1 - grid.axis)
        weight = self.constant(name, codes.to(torch.int8))
        Meta(weight).weight_grid = grid
        if bias is None:
            return weight, None, _short(shifts)
        return weight, self.constant(bias_name, bias.to(torch.int32)), _short(shifts)

    def _codes_of(self, rounded: fx.Node) -> tuple[str, Tensor, list[int]]:
        args = arguments(rounded)
        tensor = self.old.tensor(args["x"]).detach()
        call = (args["exponents"], args["axis"], args["low"], args["high"], args["levels"])
        return str(args["x"].target), weight_codes(tensor, *call), list(args["exponents"])

    def step(
        self,
        node: fx.Node,
        target: Any,
        args: tuple[Any, ...],
        suffix: str,
        grid: Grid,
        rounding: str = HALF_EVEN,
    ) -> fx.Node:
        """Return a node on the way to a node's result; its codes lie on ``grid``."""
        how = _rounding(target, rounding) | _width(target, grid)
        made = self._on(self._call(target, args, how, f"{node.name}_{suffix}"), grid)
        self._check_shifts(node, made)
        return made

    def product_fits(self, node: fx.Node, length: int, a: Grid, b: Grid) -> None:
        """Raise if a sum of ``length`` products of two activations may be too large."""
        sizes = (max(g.zero - g.low, g.high - g.zero) for g in (a, b))
        self._check_bound(node, length * next(sizes) * next(sizes), a.wide or b.wide)

    def _check_bound(self, node: fx.Node, bound: int, wide: bool) -> None:
        """Raise if a sum may leave 32 bits; a sum of wide codes may, as long as a float64 is it."""
        bits, safe = (53, WIDE_SAFE) if wide else (32, SAFE)
        if bound >= safe:
            raise PassError(
                f"the accumulator of {node.name} may overflow",
                where=where(node),
                why=f"it can reach {bound:,}, and {bits} bits hold up to {safe - 1:,}",
                hint=f"give it fewer bits, weights={{{node.name!r}: 6}}, or skip it",
            )
        text = ""
        if wide and bound >= SAFE:
            text = f"its accumulator can reach {bound:,} and takes 64 bits"
        elif not wide and bound > EXACT:
            text = f"its accumulator can reach {bound:,}, which float32 holds up to {EXACT:,}"
        if text:
            self.notes.append(Note(node.name, "bound", text, 0, Meta(node).source))

    def _check_shifts(self, old: fx.Node, node: fx.Node) -> None:
        for name, value in arguments(node).items():
            if name.endswith(("shift", "shift_by")):
                for by in value if isinstance(value, list | tuple) else (value,):
                    if by not in SHIFTS:
                        raise PassError(
                            f"{old.name} would shift by {by}",
                            where=where(old),
                            why=f"shifts go from {SHIFTS[0]} to {SHIFTS[-1]}: the exponents of its "
                            "operands and its result are too far apart",
                            hint="calibrate on data like that of the real inputs, or skip it",
                        )


def _chain(node: fx.Node) -> list[fx.Node]:
    """Return the operator that a quantizer rounds and the clips between, in order.

    Empty where the quantizer rounds something else: an input, the result of an island, or codes
    that were only moved.
    """
    if node.target is not ops.fake_quantize.default or arguments(node)["entry"]:
        return []
    chain: list[fx.Node] = []
    source: Any = node.args[0]
    while len(source.users) == 1:
        form = table.integer_form(source)
        if form is None or isinstance(form, Moves):
            return []
        chain.insert(0, source)
        if form.kind == "computes":
            return chain if _on_codes(form, source) else []
        source = form.operands(source)[0]
        if _rounds(source):
            return chain
    return []


def _on_codes(form: IntegerForm, node: fx.Node) -> bool:
    """Whether every activation and weight that a node reads is rounded."""
    layer = form.weights(node)
    if layer is not None and layer.weight.target is not ops.fake_quantize_weight.default:
        return False
    return all(map(_rounds, form.operands(node)))


def _rounds(node: fx.Node) -> bool:
    """Whether a node's result lies on a grid: it is rounded, or only moved since."""
    while node.op == "call_function":
        if node.target is ops.fake_quantize.default:
            return True
        form = table.integer_form(node)
        if not isinstance(form, Moves):
            return False
        node = form.operands(node)[0]
    return False


def _clipped(clip: fx.Node, grid: Grid, rounding: str, low: int, high: int) -> tuple[int, int]:
    """Return the bounds of the codes after one more clip.

    Rounding keeps order, so the code of a clipped number is the clipped code of the number. Where
    the largest result is less than the smallest, everything is the largest, as torch has it.
    """
    form = table.integer_form(clip)
    assert isinstance(form, Clip)
    least, most = (grid.code(b, rounding) for b in form.bounds(clip))
    return min(max(low, least), most), min(max(high, least), most)


def _grid(args: dict[str, Any]) -> Grid:
    return Grid.read(args["exponent"], args["zero"], args["low"], args["high"])


def _short(shifts: list[int]) -> list[int]:
    return shifts[:1] if len(set(shifts)) == 1 else shifts


def _rounding(target: Any, rounding: str) -> dict[str, Any]:
    """Return the keyword that says how to round, where it is not the default."""
    return {"rounding": rounding} if _takes(target, "rounding") and rounding != HALF_EVEN else {}


def _width(target: Any, grid: Grid) -> dict[str, Any]:
    """Return the keyword that says that codes are wide, where they are."""
    return {"wide": True} if grid.wide and _takes(target, "wide") else {}


def _takes(target: Any, name: str) -> bool:
    return any(a.name == name for a in target._schema.arguments)


__all__ = ["FoldShifts"]
