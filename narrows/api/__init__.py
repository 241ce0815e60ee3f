"""The public functions: `capture`, `plan`, `apply`, `quantize`, `quantize_weights`, `lower` ...

`compile` is capture, plan, apply and lower in a row. They check their arguments and call; the work
is done in `narrows.frontend`, `narrows.passes` and `narrows.backends`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from narrows.api.integers import asked_of, quantized, quick
from narrows.api.passes import checks_of, passes_for
from narrows.api.planning import plan_for, planned
from narrows.errors import UsageError
from narrows.options import gather, takes
from narrows.passes.plans.options import Choosing
from narrows.passes.quant.options import Quantization, WeightOnly

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.backends.base import Target
    from narrows.executors.base import Executor
    from narrows.ir.costs import Costs
    from narrows.ir.program import Program
    from narrows.passes.choosing.allocators.base import Allocator
    from narrows.passes.choosing.compensations.base import Compensation
    from narrows.passes.choosing.criteria.base import Criterion, Measuring, Score
    from narrows.passes.choosing.repair import Progress
    from narrows.passes.pipeline import Instrument, Pipeline, PipelineResult
    from narrows.passes.plans.plan import ChannelPlan
    from narrows.passes.quant.quantization import Quantized

PlanLike = Any  # a ChannelPlan, the path of one, or the options of `plan`


def capture(
    model: Any,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    name: str | None = None,
    state: Mapping[str, Any] | None = None,
) -> Program:
    """Return the program of a model: a graph of ATen operators and the weights by their names.

    >>> import torch, narrows
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    >>> narrows.capture(net, (torch.randn(2, 3, 8, 8),))
    Program(sequential: 2 ops, 224 parameters)

    Args:
        model: A `torch.nn.Module` in eval mode, a `torch.export.ExportedProgram` or a
            `torch.fx.GraphModule`.
        example_inputs: The positional inputs: a tuple, or one tensor. They decide every size but
            the batch, and every pass is checked on them.
        kwargs: Inputs by name.
        dynamic_batch: Whether axis 0 of the inputs may have any size. A model that fixes its batch
            is captured with the example's, and a note says so.
        name: The program's name in dumps and artifacts.
        state: Inputs that are handed back what an output was, a cache of keys or a hidden state:
            ``{"k_cache": 1}`` says that of the input ``k_cache`` and output 1. Such an output is
            told by its number, or by a path into nested results, ``(1, "h")``. The channels of the
            two live or die together, and may go: `Program.state` tells what is left of a state.

    Raises:
        CaptureError: The model cannot be captured; the message says which construct, where, and
            what to do about it.
    """
    from narrows.frontend import capture as run

    return run(
        model, example_inputs, kwargs=kwargs, dynamic_batch=dynamic_batch, name=name, state=state
    )


@takes(Choosing)
def plan(
    program: Program,
    keep_inputs: Mapping[str, Any] | None = None,
    keep_outputs: Mapping[str, Any] | None = None,
    *,
    target: str | Target | None = None,
    integers: bool = False,
    executor: str | Executor | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    macs: float | Mapping[str, float] | None = None,
    params: float | Mapping[str, float] | None = None,
    latency: float | None = None,
    accuracy_drop: float | None = None,
    divergence: float | None = None,
    limits: Mapping[str, float | Mapping[str, float]] | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    allocator: str | Allocator | None = None,
    outputs: str = "auto",
    zeros: bool = True,
    criterion: str | Criterion | Measuring | Score = "l1",
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    ratio: float | Mapping[str, float] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    costs: Costs | str | os.PathLike[str] | None = None,
    batch: int | None = None,
    constrained: bool = True,
    side: str | None = None,
    scope: str = "local",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    min_width: int = 1,
) -> ChannelPlan:
    """Return a plan: which channels every consumer reads and every producer makes.

    Nothing is removed yet; `ChannelPlan.masked` is the program that a rewrite has to equal.

    >>> plan = narrows.plan(program, keep_inputs={"conv2.weight": [0, 2, 3]})
    >>> plan = narrows.plan(program, ratio=0.5, criterion="l1", exclude=["head.*"])
    >>> plan = narrows.plan(program, ratio=0.5, criterion="taylor", data=[images])
    >>> plan = narrows.plan(program, latency=0.8, target="onnx")
    >>> plan = narrows.plan(program, macs=0.7, data=[images], constrained=False)
    >>> plan = narrows.plan(program, macs=0.7, params=0.8, data=[images])
    >>> plan = narrows.plan(program, accuracy_drop=0.5, evaluate=accuracy, data=[images])

    Args:
        program: The program.
        keep_inputs: Per weight the input channels it keeps, as indices or as a boolean mask over
            ``in_channels``; the others count as zero for that consumer alone.
        keep_outputs: Per weight the output channels it keeps, as indices or as a mask over
            ``out_channels``; the others contribute zero after the norm that follows.
        target: The target whose measured costs a ``latency`` is predicted by. With a ``ratio``,
            channels are kept after all that the target has a place for anyway; with nothing but
            what may be lost, the latency on it falls, and not the multiply-accumulates.
        integers: Whether the program is quantized next: the target's costs are then those of
            operators in integers, of the unpruned program, too.
        executor: Where plans are tried that do not hang on one another, as those of one generation
            of ``allocator="reward"``: ``here``, ``processes``, ``ray``, or an `Executor`.
        jobs: How many run at once, what the executor has it unless given.
        progress: Called with what is done, how far it is and of how much.
        macs, ...: The options, those of `narrows.passes.plans.options.Choosing`.

    Raises:
        PlanError: Nothing can be removed, or a budget cannot be met; a `PlanUsageError`,
            which is a `UsageError` too, where a weight is unknown or a mask has another length.
        UsageError: An option or the target is unknown, or the target has no cost table.
    """
    choosing = gather(Choosing, locals())
    refuse_model(program, "plan")
    if integers and target is None:
        raise UsageError("integers would have no effect without a target", hint='target="onnx"')
    masks = {"keep_inputs": keep_inputs, "keep_outputs": keep_outputs}
    return planned(program, masks, choosing, target, progress, executor, jobs, integers)


def compensate(
    program: Program,
    plan: PlanLike,
    *,
    data: Iterable[Any] | None = None,
    method: str | Compensation = "least-squares",
    outputs: str = "auto",
    progress: Progress | None = None,
) -> Program:
    """Return the program with weights that make up for what a plan drops; nothing is trained.

    The result has its norms folded and a bias in every layer, and is as large as before. The plan
    is one of it: ``narrows.apply(result, plan)`` removes the channels, and equals
    ``plan.masked(result)``.

    >>> plan = narrows.plan(program, macs=0.7, data=[images], constrained=False)
    >>> made = narrows.compensate(program, plan, data=[images])
    >>> smaller = narrows.apply(made, plan)

    Args:
        program: The program that the plan is of.
        plan: As for `apply`.
        data: Batches of inputs like the real ones, without labels: each a tuple of inputs, a dict
            by name, or one tensor. Some hundred examples are enough. ``udfc`` and ``fold`` go
            without; with them a note says how far the outputs are.
        method: One of ``narrows compensations``, spelled as passes are (``distill{seconds=60}``):
            ``least-squares``, ``symmetric``, ``moments``, ``mean``; without data ``udfc``,
            ``fold``; by steps of gradient descent ``blocks``, ``distill``; one that a package adds
            (entry points ``narrows.compensations``). Or an object; see
            `narrows.passes.choosing.compensations`.
        outputs: What the outputs are, for the note on how far they are from the unpruned ones:
            ``logits``, ``values`` or ``auto``.
        progress: Called with what is done, how far it is and of how much.

    Raises:
        PlanError: The plan is of another model.
        UsageError: There is no data, or the method is unknown.
    """
    from narrows.passes.choosing.compensate import compensated
    from narrows.passes.choosing.compensations.catalog import find, needs_data
    from narrows.passes.plans.plan import loaded
    from narrows.passes.quant.batches import CHOOSING, batches

    refuse_model(program, "compensate")
    found = find(method)
    if isinstance(plan, Mapping):
        plan = plan_for(program, plan, None)
    plan = loaded(plan)
    given = []
    if data is not None or needs_data(found):
        given = [*batches(program, data, "compensating", CHOOSING)]
    return compensated(program, plan, given, found, outputs, progress)


def refuse_model(program: Any, function: str) -> None:
    """Raise `UsageError` unless a public function was given a program."""
    from narrows.ir.program import Program

    if not isinstance(program, Program):
        raise UsageError(
            f"{function} takes a Program, got {type(program).__name__}",
            hint=f"narrows.{function}(narrows.capture(model, inputs), ...)",
        )


def apply(
    program: Program,
    plan: PlanLike = None,
    *,
    target: str | Target | None = None,
    batch: int | None = None,
    integers: bool = False,
    pipeline: Pipeline | str | None = None,
    check: bool = True,
    instruments: Sequence[Instrument] = (),
) -> Program:
    """Return the program without the channels that a plan drops; it equals the masked program.

    Args:
        program: The program; it stays as it is.
        plan: A `ChannelPlan`, the path of a saved one, or options for `plan` as a dict (a
            ``latency`` is then that of ``target``). ``None`` removes what is dead or constant
            anyway.
        target: The target to choose reads and widths for, by its measured costs, with batch norms
            folded; without one the program is the smallest there is, whatever that costs, and can
            be trained.
        batch: The number of examples to choose them for; that of the plan's options, else 1. The
            program takes any.
        integers: Whether the program is quantized next: reads and widths are then chosen by what
            operators cost in integers.
        pipeline: Passes to run in place of the usual ones, as a `Pipeline` or its spelling.
        check: Whether to compare the result with the masked program on the examples, in float64
            where their type cannot tell. A program that was not says so in its notes.
        instruments: What else watches the passes; see `narrows.passes.instruments`.

    Raises:
        PlanError: The plan does not fit the program.
        FidelityError: The result differs; the message names the output, the pass and the node.
        PassError: The result does not run.
    """
    from narrows.passes.proof import Proof, Unproven

    refuse_model(program, "apply")
    passes = passes_for(program, plan, target, batch, pipeline, integers)
    proof = (Proof if check else Unproven)(len(passes.passes))
    return passes.run(program, [proof, *instruments]).program


def rewrite(
    program: Program,
    plan: PlanLike = None,
    *,
    target: str | Target | None = None,
    batch: int | None = None,
    integers: bool = False,
    pipeline: Pipeline | str | None = None,
    check: bool = True,
    double: bool = False,
    instruments: Sequence[Instrument] = (),
) -> PipelineResult:
    """Return what `apply` does, with a report per pass; the other arguments are the same.

    Args:
        program: The program; it stays as it is.
        check: Whether every pass is verified and held to its own reference on the examples.
        double: Whether to check in float64, too.
        instruments: What else watches the passes, after the checks; they see what those measured.
    """
    refuse_model(program, "apply")
    passes = passes_for(program, plan, target, batch, pipeline, integers)
    return passes.run(program, [*checks_of(passes, check, double), *instruments])


@takes(Quantization)
def quantize(
    program: Program,
    calibration: Iterable[Any] | None = None,
    *,
    weights: int | str | Mapping[str, int | str] = 8,
    activations: int | Mapping[str, int] = 8,
    method: str = "auto",
    percentile: float = 99.99,
    first_last: int | str | None = 8,
    skip: Iterable[str] = (),
    rounding: str = "half_even",
    align: bool = True,
    equalize: bool = False,
    correct_bias: bool = True,
    strict: bool = False,
    levels: bool = False,
    allow_lost: bool = False,
    budget: int | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    loss: str | None = None,
    seed: int | None = None,
    plan: Any = None,
    check: bool = True,
    instruments: Sequence[Instrument] = (),
) -> Quantized:
    """Return a program in integers, whose scales are powers of two: multiplications by a scale are
    shifts.

    >>> quantized = narrows.quantize(program, [images])
    >>> artifact = narrows.lower(quantized.program)      # equal to it, bit for bit
    >>> quantized.plan.save("quant.json")

    Activations get one scale a tensor and codes in uint8 with the zero point 0 or 128, weights one
    scale per output channel and codes in int8, biases int32. The bits say how many codes are used.
    Activations of more than 8 bits have codes in int16.

    Args:
        program: A captured or pruned program.
        calibration: Inputs like the real ones, streamed once: an iterable of batches, each a tuple
            of positional inputs, a dict of inputs by name, or one tensor.
        weights, ...: The options, those of `narrows.passes.quant.options.Quantization`.
        plan: A `QuantPlan`, or the path of a saved one, to use in place of calibration and options.
            It alone determines the integers; one of an older narrows leaves ``equalize`` and
            ``activations`` to you.
        check: Whether every pass is verified and held to its fidelity on the examples.
        instruments: What else watches the passes; they run after the checks.

    Raises:
        UsageError: There is no calibration data, or an argument is out of range, or has no effect
            beside a plan.
        PassError: A tensor is NaN, infinite or extreme; an accumulator could overflow; an operator
            has no integer form under ``strict``. The message names the layer.
        PlanError: The plan is of another program, or of another checkpoint.
        FidelityError: With ``check``, the integers differ from the fake-quantized program.
    """
    options = gather(Quantization, locals())
    refuse_model(program, "quantize")
    return quantized(program, calibration, options, plan, check, instruments)


@takes(WeightOnly)
def quantize_weights(
    program: Program,
    calibration: Iterable[Any] | None = None,
    *,
    bits: int = 4,
    group: int = 32,
    groups: str = "auto",
    method: str = "gptq",
    activations: str = "float",
    skip: Iterable[str] = (),
) -> Program:
    """Return a program whose linear layers hold their weights in a few bits; all else stays
    floating-point.

    >>> smaller = narrows.quantize_weights(program, [tokens], bits=4)
    >>> faster = narrows.quantize_weights(program, [tokens], bits=4, activations="dynamic")
    >>> artifact = narrows.lower(smaller)

    A scale and a zero point serve a group of weights. A weight that another operator reads, too,
    such as an embedding, stays as it is; the program's notes say so.

    Args:
        program: A captured program.
        calibration: Inputs like the real ones, as for `quantize`; not needed for
            ``method="nearest"`` with groups along one axis.
        bits, ...: The options, those of `narrows.passes.quant.options.WeightOnly`.

    Raises:
        UsageError: There is no calibration data, or an argument is out of range.
        PassError: There is no linear layer, a glob matches none, or a number is not finite.
    """
    options = gather(WeightOnly, locals())
    from narrows.passes.quant.weight_only import quantize_weights as run

    refuse_model(program, "quantize_weights")
    return run(program, calibration, options)


def lower(
    program: Program, target: str | Target = "onnx", *, plan: PlanLike = None, **options: Any
) -> Artifact:
    """Return the program as an artifact of a target, checked against the program where it runs.

    Args:
        program: The program; batch norms that still stand are folded on the way.
        target: The target or its name.
        plan: The plan that made the program, or its path, to be kept with the artifact.
        **options: The target's options.

    Raises:
        UsageError: The target or an option is unknown.
        LowerError: The target cannot express the program, or computes something else.
    """
    from narrows.api.lowering import pair_of, write

    refuse_model(program, "lower")
    return write(program, target, plan, options).settled(lambda: pair_of(program))


def compile(
    model: Any,
    inputs: Any,
    plan: PlanLike = None,
    target: str | Target = "onnx",
    *,
    batch: int | None = None,
    pipeline: Pipeline | str | None = None,
    quantize: Iterable[Any] | Mapping[str, Any] | None = None,
    dump: str | os.PathLike[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    name: str | None = None,
    state: Mapping[str, Any] | None = None,
    check: bool = True,
    double: bool = False,
    contest: bool | None = None,
    instruments: Sequence[Instrument] = (),
    on_result: Callable[[PipelineResult], None] | None = None,
    **options: Any,
) -> Artifact:
    """Return a model compiled: captured, rewritten, quantized if asked, checked and lowered.

    >>> artifact = narrows.compile(model, (x,), plan={"ratio": 0.5})
    >>> artifact = narrows.compile(model, (x,), plan={"ratio": 0.5}, quantize=[images])
    >>> artifact.save("out")
    >>> print(artifact.report)

    Args:
        model: As for `capture`.
        inputs: As ``example_inputs`` of `capture`.
        plan: As for `apply`; options for `plan` as a dict are the way to plan without capturing
            first. A ``latency`` among them is that of ``target``.
        target: As for `lower`.
        batch, pipeline: As for `apply`.
        quantize: Calibration data as for `quantize`, or all of its options as a dict:
            ``{"calibration": [images], "weights": 4}``. Without it the result is floating-point.
        dump: A folder for the program after every pass; ``narrows show`` and ``why`` read it.
        kwargs, dynamic_batch, name, state: As for `capture`.
        check, double, instruments: As for `rewrite`.
        contest: Whether the best forms by prediction are timed on the runtime here, and the fastest
            ships (`narrows.api.contest`); by default where the target runs here at once.
        on_result: Called with the pipeline's result before it is quantized or lowered.
        **options: The target's options.

    Raises:
        CaptureError: The model cannot be captured.
        PlanError: The plan does not fit it.
        PassError: It cannot be quantized; see `quantize`.
        FidelityError: A pass changed the outputs beyond what it declares.
        LowerError: The target cannot express the program.
    """
    from narrows.api import contest as contests
    from narrows.api.gains import Size, gains
    from narrows.api.lowering import lower_freeing
    from narrows.backends import make_target
    from narrows.passes.instruments import Dumper

    integers = None if quantize is None else asked_of(quantize, check)
    program = capture(
        model, inputs, kwargs=kwargs, dynamic_batch=dynamic_batch, name=name, state=state
    )
    emitted = make_target(target, **options)
    if isinstance(plan, Mapping):
        batch = plan.get("batch") if batch is None else batch
        plan = plan_for(program, plan, emitted, integers is not None)
    dumper = None if dump is None else Dumper(dump)
    watches = [*instruments, *([] if dumper is None else [dumper])]
    passes = passes_for(program, plan, emitted, batch, pipeline, integers is not None)
    ran = contests.run(
        program, passes, emitted, [*checks_of(passes, check, double), *watches],
        asked=contest, quantize=quick(integers),
    )  # fmt: skip
    result, passes, held = ran.result, ran.passes, ran.contest
    if on_result is not None:
        on_result(result)
    before, after = Size.of(program, passes), Size.of(result.program, passes)
    made = [result.program]
    del ran, result
    if integers is not None:
        integers["instruments"] = [*watches, *integers["instruments"]]
        artifact = lower(quantized(made.pop(), **integers).program, emitted, plan=plan)
    else:
        how: dict[str, Any] = {"pipeline": passes, "target": emitted, "check": False}
        again = functools.partial(rewrite, program, **how)
        artifact = lower_freeing(made, lambda: again().program, emitted, plan=plan)
    artifact.manifest.update(gains(before, after, artifact, held))
    if dumper is not None:
        dumper.dump.seal(artifact.identity)
    return artifact
