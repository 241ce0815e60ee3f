"""One-feature networks beside apple-upscale: right, silently wrong, or not done at all.

    python -m benchmarks.features [--networks glu cat ...] [--amount 0.5] [--json f.json]

Every network of the tests gets the same random input masks in both tools, in float64, and the
result is compared with the masked model. Masks are on what apple-upscale documents, the weights of
convolutions and linear layers; a network without such a layer is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.machine import table, write
from benchmarks.reorder.apart import apart
from benchmarks.reorder.prepare import in_a_line

RIGHT = 1e-9  # float64, relative: a channel in the wrong place is off by 1e-3 and more
LIMIT = 60.0  # seconds per process
TOGETHER = 20  # networks in one process; if it does not come through, each gets its own


def check_all(names: Sequence[str], tool: str, amount: float) -> dict[str, dict[str, Any]]:
    """Return the results of several networks in one process."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            found[name] = check(name, tool, amount)
        except Exception as error:
            found[name] = {"failure": in_a_line(error)}
    return found


def check(name: str, tool: str, amount: float) -> dict[str, Any]:
    """Return the relative error of a tool's result on a network."""
    from narrows.ir.compare import relative_error
    from tests.networks import NETWORKS
    from tests.networks.reference import masked_module

    network = NETWORKS[name]
    module = network.build()
    keep = masks(module, network.inputs(1), amount)
    if not keep:
        return {"skipped": "no layer to mask"}
    inputs = network.inputs(2, seed=3)
    masked = masked_module(module, keep, {}, inputs)
    result = TOOLS[tool](module, network.inputs(2), keep, inputs)
    with torch.no_grad():
        return {"error": relative_error(result, masked(*inputs))}


def masks(module: nn.Module, inputs: Any, amount: float) -> dict[str, tuple[int, ...]]:
    """Return random kept inputs of every layer that is called and reads more than an image."""
    from benchmarks.reorder.case import drawn

    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in module.modules()]
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    weights = {
        f"{name}.weight": layer.weight.detach()
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and layer in called and getattr(layer, "groups", 1) == 1
    }
    return drawn({n: w for n, w in weights.items() if w.shape[1] > 3}, amount)


def narrows_tool(module: nn.Module, examples: Any, keep: Any, inputs: Any) -> Any:
    """Return what narrows' usual pipeline computes."""
    import narrows

    program = narrows.capture(module, examples)
    return narrows.apply(program, narrows.plan(program, keep_inputs=keep, zeros=False))(*inputs)


def upscale_tool(module: nn.Module, examples: Any, keep: Any, inputs: Any) -> Any:
    """Return what the module computes after apple-upscale has pruned it."""
    from benchmarks.reorder.peers import upscale, without_inplace

    upscale(without_inplace(module), examples, keep)
    with torch.no_grad():
        return module(*inputs)


TOOLS: dict[str, Callable[..., Any]] = {"narrows": narrows_tool, "apple-upscale": upscale_tool}


def run(names: Sequence[str], tool: str, amount: float) -> dict[str, dict[str, Any]]:
    """Return the results of several networks; one that ends or blocks its process is by itself."""
    found = apart(check_all, names, tool, amount, limit=LIMIT)
    if "failure" not in found:
        return found
    if len(names) == 1:
        return {names[0]: found}
    return {n: r for name in names for n, r in run([name], tool, amount).items()}


def verdict(found: dict[str, Any]) -> str:
    """Return what became of a network, in a word."""
    if "error" not in found:
        return "skipped" if "skipped" in found else "failed"
    return "right" if found["error"] <= RIGHT else "wrong"


def main() -> int:
    """Run the comparison; the exit code is 1 when narrows is not right on a network."""
    from tests.networks import NETWORKS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), metavar="NETWORK")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--amount", type=float, default=0.5)
    parser.add_argument("--json", help="also write the results here")
    options = parser.parse_args()
    names = options.networks or sorted(NETWORKS)
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    for tool in options.tools:
        for start in range(0, len(names), TOGETHER):
            some = names[start : start + TOGETHER]
            for name, found in run(some, tool, options.amount).items():
                results[name][tool] = found
    rows = [[name, *(verdict(r[t]) for t in options.tools)] for name, r in results.items()]
    print(table(["network", *options.tools], rows))
    for tool in options.tools:
        counts = Counter(verdict(r[tool]) for r in results.values())
        print(f"{tool}: {', '.join(f'{n} {word}' for word, n in counts.most_common())}")
    write(options.json, results)
    words = {verdict(r.get("narrows", {"error": 0.0})) for r in results.values()}
    return int(bool(words & {"wrong", "failed"}))


if __name__ == "__main__":
    sys.exit(main())
