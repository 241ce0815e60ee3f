"""The arguments of every command, as one argparse tree.

The tree is also what ``narrows completion`` writes its scripts from.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from narrows.errors import suggest

CHOICE = re.compile(r"invalid choice: '(?P<word>[^']*)' \(choose from (?P<known>.*)\)")
DATA = ".npy, or .npz with an array per input; axis 0 counts the samples"
EPILOG = "exit codes: 0 done, 1 a finding or a failure, 2 wrong usage"


class Parser(argparse.ArgumentParser):
    """A parser that says which word was meant in place of one that it does not know.

    What is slow to find out, such as the flags that targets have, is added when the parser is used.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._later: list[Callable[[], None]] = []

    def later(self, add: Callable[[], None]) -> None:
        """Have a function called, which adds arguments, when the parser is used."""
        self._later.append(add)

    def complete(self) -> None:
        """Add what was put off."""
        while self._later:
            self._later.pop(0)()

    def format_help(self) -> str:
        """Return the help of all arguments."""
        self.complete()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit."""
        found = CHOICE.search(message)
        if found is not None:
            known = [word.strip("'") for word in found["known"].split(", ")]
            hint = suggest(found["word"], known)
            message = f"{message}; {hint}" if hint else message
        super().error(message)


class Commands(argparse._SubParsersAction):
    """The commands; the one that is called gets all of its arguments first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Parse the words of one command."""
        if values[0] in self.choices:
            self.choices[values[0]].complete()
        super().__call__(parser, namespace, values, option_string)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    from narrows.version import VERSION

    parser = Parser(
        prog="narrows",
        description="Make the channels of a network fewer, exactly, and emit something smaller.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"narrows {VERSION}")
    commands = parser.add_subparsers(
        action=Commands, title="commands", metavar="COMMAND", required=True
    )
    for add in (
        _compile, _compress, _quantize, _quantize_weights, _demo, _plan, _criteria,
        _budgets, _allocators, _compensations, _sense, _passes, _ops, _couplings, _why, _show,
        _diff, _check, _bench, _targets, _completion,
    ):  # fmt: skip
        add(commands)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command line; argparse prints and exits where they are wrong.

    argparse fills an optional word before it has seen the options, so that a NODE after them is
    left over: it is taken here.
    """
    parser = build_parser()
    arguments, left = parser.parse_known_args(words)
    takes_node = getattr(arguments, "node", ...) is None
    if takes_node and len(left) == 1 and not left[0].startswith("-"):
        arguments.node = left.pop()
    if left:
        known = arguments.parser._option_string_actions
        hint = next((suggest(w.partition("=")[0], known) for w in left if w.startswith("-")), "")
        parser.error(f"unrecognized arguments: {' '.join(left)}{hint and '; '}{hint}")
    return arguments


def _command(commands: Any, name: str, run: str, summary: str) -> Parser:
    """Add a command; ``run`` names its function as ``module:function`` of this package."""
    command = commands.add_parser(name, help=summary, description=summary, epilog=EPILOG)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--traceback", action="store_true", help="show where an error came from")
    command.set_defaults(run=_lazy(run), parser=command)
    return command


def _lazy(path: str) -> Callable[[argparse.Namespace], int]:
    """Return a function that imports the command when it runs, so that ``--help`` is quick."""
    module, _, name = path.partition(":")

    def run(arguments: argparse.Namespace) -> int:
        return getattr(importlib.import_module(f"narrows.cli.{module}"), name)(arguments)

    return run


def _model(
    command: argparse.ArgumentParser, *, optional: bool = False, or_dump: bool = False
) -> None:
    """Add what names a model and its inputs."""
    model = "MODULE:FACTORY"
    command.add_argument(
        "model",
        nargs="?" if optional else None,
        metavar=f"{model}|DUMP" if or_dump else model,
        help="a module or a .py file, and a function in it that returns the model"
        + ("; or a dump folder" if or_dump else ""),
    )
    _source(command)


def _source(command: Any) -> None:
    """Add what a model's inputs and weights come from."""
    command.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="one input: f32[2,3,224,224], i64[2,16]:1000 for integers below 1000, name=f32[2,8] "
        "for one by name; repeat for more",
    )
    command.add_argument(
        "--weights", metavar="FILE", help="a checkpoint: .pt, .pth or .safetensors"
    )
    command.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load a checkpoint that holds more than tensors; it can run any code",
    )
    command.add_argument(
        "--fixed-batch", action="store_true", help="keep the batch size of the inputs"
    )
    command.add_argument(
        "--state",
        action="append",
        default=[],
        metavar="INPUT=OUTPUT",
        help="an input that is handed back an output: cache=1, hidden=1.h for one in nested "
        "results; repeat for more",
    )


def _compile(commands: Any) -> None:
    command = _command(commands, "compile", "commands:compile_", "compile a model to an artifact")
    _model(command)
    command.add_argument(
        "-p",
        "--pipeline",
        metavar="PASSES",
        help='passes in order: "prune-channels{plan=p.json}, fold-batch-norm"',
    )
    command.add_argument("--plan", metavar="FILE", help="a plan, as `narrows plan` writes it")
    command.add_argument(
        "--quantize",
        metavar="FILE",
        help=f"turn the result into integers and shifts, calibrated on data: {DATA}",
    )
    _choice(command)
    _grids(command)
    command.add_argument(
        "--dump",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="keep the program after every pass, in the artifact or in FOLDER",
    )
    command.add_argument(
        "--double", action="store_true", help="check every pass in float64 as well"
    )
    _contest(command)
    _emitted(command)


def _contest(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-contest",
        action="store_true",
        help="take the form that is predicted to be fastest, and time none here",
    )


def _judged(command: argparse.ArgumentParser, worth: str) -> None:
    command.add_argument(
        "--data", required=True, metavar="FILE", help=f"inputs like the real ones: {DATA}"
    )
    command.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help=f"a function that is given a program and returns {worth}",
    )


def _compress(commands: Any) -> None:
    summary = "the best artifact within budgets: chosen, solved for, pruned, checked"
    command = _command(commands, "compress", "compress:compress", summary)
    _model(command)
    _judged(command, "what it is worth, in points")
    command.add_argument("--save-plan", metavar="FILE", help="where the channel plan goes, as JSON")
    command.add_argument(
        "--save-solved",
        metavar="FILE",
        help="where the plan goes with the weights that were found for it",
    )
    group = command.add_argument_group("the budgets")
    command.later(lambda: _options(group, "narrows.api.compressing", "Compressing"))
    _contest(command)
    _emitted(command)


def _quantize(commands: Any) -> None:
    summary = "turn a model into integers and shifts, as an artifact"
    command = _command(commands, "quantize", "quantize:quantize", summary)
    _model(command)
    command.add_argument("--data", metavar="FILE", help=f"inputs like the real ones: {DATA}")
    command.add_argument(
        "--plan", metavar="FILE", help="a quantization plan, in place of data (--save-plan)"
    )
    command.add_argument(
        "--save-plan", metavar="FILE", help="where the plan goes, as JSON; - for standard output"
    )
    command.add_argument(
        "--channels", metavar="FILE", help="a channel plan to prune by first (narrows plan)"
    )
    _grids(command)
    _emitted(command)


def _quantize_weights(commands: Any) -> None:
    summary = "hold the weights of linear layers in a few bits, as an artifact"
    command = _command(commands, "quantize-weights", "quantize:quantize_weights", summary)
    _model(command)
    command.add_argument(
        "--data",
        metavar="FILE",
        help=f"inputs like the real ones: {DATA}; --method nearest with --groups input or output "
        "needs none",
    )
    group = command.add_argument_group("choosing codes")
    command.later(lambda: _options(group, "narrows.passes.quant.options", "WeightOnly"))
    _emitted(command)


def _emitted(command: Parser) -> None:
    """Add what is emitted, and where to."""
    command.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the artifact's folder"
    )
    command.add_argument(
        "-t",
        "--target",
        default="onnx",
        metavar="TARGET",
        help="what to emit: onnx, onnx{opset=21}, tvm:aarch64 or another; see narrows targets",
    )
    command.later(lambda: _target_flags(command))


def _grids(command: Parser) -> None:
    """Add how grids are chosen; what is not given is left to `narrows.quantize`."""
    group = command.add_argument_group("choosing grids")
    command.later(lambda: _options(group, "narrows.passes.quant.options", "Quantization"))
    group.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure on the data what every tensor loses and which costs most: text, JSON and a "
        "page with plots, in DIR.report or FOLDER",
    )


def _demo(commands: Any) -> None:
    summary = "train, prune and compile a small network, from start to end"
    command = _command(commands, "demo", "commands:demo", summary)
    command.add_argument(
        "-o", "--output", default="demo-out", metavar="DIR", help="where everything goes (demo-out)"
    )
    command.add_argument(
        "--quick", action="store_true", help="train a little and measure roughly, in seconds"
    )


def _plan(commands: Any) -> None:
    command = _command(commands, "plan", "commands:plan", "choose the channels to keep")
    _model(command)
    command.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the plan, as JSON; - for standard output",
    )
    command.add_argument(
        "-t", "--target", metavar="TARGET", help="the target that --latency is one of: onnx"
    )
    command.add_argument(
        "--integers",
        action="store_true",
        help="the program is quantized next: what operators of the target cost in integers counts",
    )
    _choice(command)
    _executor(command)


def _choice(command: Parser) -> None:
    """Add how channels are chosen; what is not given is left to `narrows.plan`."""
    group = command.add_argument_group("choosing channels")
    command.later(lambda: _options(group, "narrows.passes.plans.options", "Choosing"))


def _options(group: Any, module: str, name: str) -> None:
    """Add the flags of a dataclass of options."""
    from narrows.cli.flags import add_flags

    add_flags(group, getattr(importlib.import_module(module), name))


def _passes(commands: Any) -> None:
    _command(commands, "passes", "inspect:passes", "list the passes and their options")


def _criteria(commands: Any) -> None:
    summary = "list the criteria: what each scores, the data it needs, whose it is"
    _command(commands, "criteria", "inspect:criteria", summary)


def _budgets(commands: Any) -> None:
    summary = "list the budgets: what each counts"
    _command(commands, "budgets", "inspect:budgets", summary)


def _allocators(commands: Any) -> None:
    summary = "list the allocators: how each says what every layer keeps within budgets"
    _command(commands, "allocators", "inspect:allocators", summary)


def _compensations(commands: Any) -> None:
    summary = "list the ways in which weights make up for what is gone"
    _command(commands, "compensations", "inspect:compensations", summary)


def _sense(commands: Any) -> None:
    summary = "measure what the outputs lose to one change at a time, coupling by coupling"
    command = _command(commands, "sense", "sense:sense", summary)
    _model(command)
    _judged(command, "what it is worth")
    command.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where the table goes, as JSON; - for standard output",
    )
    group = command.add_argument_group("what is tried")
    command.later(lambda: _options(group, "narrows.passes.sensing.options", "Sensing"))
    _executor(command).add_argument(
        "--cache", metavar="DIR", help="keep every result here, and go on from what is kept"
    )


def _executor(command: argparse.ArgumentParser) -> Any:
    """Add where jobs run, and return the group."""
    how = command.add_argument_group("how it runs")
    how.add_argument(
        "--executor", metavar="NAME", help="where jobs run: here, processes, ray or another"
    )
    how.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="how many run at once (as many as the executor has it)",
    )
    return how


def _ops(commands: Any) -> None:
    summary = "print the op table, or what it lacks for a model"
    command = _command(commands, "ops", "inspect:ops", summary)
    command.add_argument("--markdown", action="store_true", help="print the table as docs/ops.md")
    _model(command, optional=True)


def _couplings(commands: Any) -> None:
    summary = "list the channels that live or die together"
    command = _command(commands, "couplings", "inspect:couplings", summary)
    _model(command, or_dump=True)
    command.add_argument("node", nargs="?", metavar="NODE", help="only those that NODE carries")


def _why(commands: Any) -> None:
    summary = "explain what a compile did to a node, and why not more"
    command = _command(commands, "why", "inspect:why", summary)
    command.add_argument("dump", metavar="DUMP", help="a dump, or an artifact's folder with one")
    command.add_argument("node", metavar="NODE", help="a node or a weight")


def _show(commands: Any) -> None:
    command = _command(commands, "show", "inspect:show", "print a program of a dump")
    command.add_argument("dump", metavar="DUMP[@PASS]", help="a dump; the last pass unless named")
    command.add_argument("--only", default="*", metavar="GLOB", help="only these nodes or modules")
    command.add_argument("--weights", action="store_true", help="append the weights")


def _diff(commands: Any) -> None:
    summary = "compare two programs; the exit code is 1 where they differ"
    command = _command(commands, "diff", "inspect:diff", summary)
    command.add_argument("old", metavar="A[@PASS]", help="a dump")
    command.add_argument("new", metavar="B[@PASS]", help="the same or another dump")


def _check(commands: Any) -> None:
    summary = "check an artifact's files, and its outputs against those it was made with"
    command = _command(commands, "check", "commands:check", summary)
    command.add_argument("artifact", metavar="ARTIFACT", help="the artifact's folder")
    _trust(command)


def _trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust",
        action="store_true",
        help="run artifacts that are code, as those of c, torch and tvm are; they can do whatever "
        "you can",
    )


def _bench(commands: Any) -> None:
    summary = "time an artifact, against another one if there is one, or what operators cost"
    command = _command(commands, "bench", "bench:bench", summary)
    command.add_argument("artifact", nargs="?", metavar="ARTIFACT", help="the artifact's folder")
    command.add_argument("--against", metavar="ARTIFACT", help="what to compare it with")
    command.add_argument(
        "--batch", metavar="N[,N]", help="batch sizes (1, or the one it was compiled for)"
    )
    command.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="how many turns each has (15)"
    )
    command.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads of the runtime (1)"
    )
    command.add_argument(
        "--profile", action="store_true", help="print the runtime's account, node by node"
    )
    _trust(command)
    measuring = command.add_argument_group("measuring what operators cost")
    measuring.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="MODULE:FACTORY",
        help="measure operators on this machine, and exactly those of a model if one is named",
    )
    measuring.add_argument("--quick", action="store_true", help="measure few sizes, in seconds")
    measuring.add_argument(
        "-o", "--output", metavar="FILE", help="where the table goes (the user's cache)"
    )
    _source(measuring)
    command.later(lambda: _measured(measuring))


def _target_flags(command: Parser) -> None:
    """Add the flags that targets have for their options."""
    from narrows.cli.emitted import add_target_flags

    add_target_flags(command)


def _measured(group: Any) -> None:
    """Add what is measured."""
    from narrows.cli.calibrate import add_measured

    add_measured(group)


def _targets(commands: Any) -> None:
    summary = "list the targets: what each needs, whether it is here, how it is checked"
    _command(commands, "targets", "targets:targets", summary)


def _completion(commands: Any) -> None:
    command = _command(commands, "completion", "completion:completion", "print a completion script")
    command.add_argument("shell", choices=("bash", "zsh", "fish"))
