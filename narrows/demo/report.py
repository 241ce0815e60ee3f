"""What the demo measured, as text for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrows.passes.pipeline import format_count


def describe(report: dict[str, Any]) -> str:
    """Return the report as text for a person."""
    names = list(report["parameters"])
    count, accuracy, seconds = report["images"], report["accuracy"], report["seconds"]
    removed = report["channels_removed"]
    rows: list[list[str]] = [["", *names]]
    rows.append(["parameters", *(format_count(report["parameters"][n]) for n in names)])
    rows.append(["MACs", *(format_count(report["macs"][n]) for n in names)])
    rows.append(["artifact", *(f"{report['bytes'][n] / 1024:.0f} KiB" for n in names)])
    rows.append(["test accuracy", *(f"{accuracy[n]:.2%}" for n in names)])
    for batch, timed in report["latency"].items():
        rows.append([batch, *(f"{timed[n]['seconds'] * 1e6:.0f} us" for n in names)])
        rows.append(["  speed", *(f"{timed[n]['speedup']:.2f} x" for n in names)])
    lines = [
        f"{count['train']:,} digits to train on ({seconds['training']:.0f} s), "
        f"{count['validation']} to choose the ratio with, {count['test']} to test on",
        f"test accuracy {accuracy['trained']:.2%} trained, {accuracy['masked']:.2%} masked",
        f"plan: {removed['zeros']} channels that training left at zero, {removed['plan']} with the "
        f"weakest {report['ratio']:.0%} of what each layer reads;",
        f"the ratio is the largest tried that costs {report['allowed_fall']:.0%} of validation "
        "accuracy or less",
        "",
        report["table"].rstrip(),
        "error: largest difference from what each pass owes, relative to the largest output",
        f"pruned against masked, on the test images: {report['error']:.1e}",
        "",
        report["quantize_table"].rstrip(),
        f"quantized: {differing(report)}",
        f"C: {describe_c(report['c'])}",
        "",
        *align(rows),
        f"tuned: the pruned program trained {seconds['fine-tuning']:.0f} s more, captured again",
        "quantized: the tuned program in 8-bit integers and shifts, calibrated on training images",
        "speed: in ONNX Runtime, one thread, in turns with the unpruned artifact; median of ratios",
        *verdict(report),
    ]
    return "\n".join(lines)


def differing(report: dict[str, Any]) -> str:
    """Return how the integer artifact compares with its program, as a sentence."""
    floats = len(report["floats"])
    return (
        f"{report['differing']} outputs differ between ONNX Runtime and the interpreter; "
        f"operators that stay float: {floats or 'none'}"
    )


def describe_c(facts: dict[str, Any]) -> str:
    """Return what the C code takes and gives, as a sentence."""
    size = f"{facts['constants'] / 1024:.0f} KiB of constants, an arena of {facts['arena']:,} bytes"
    if "skipped" in facts:
        return f"{size}; written, not run: {facts['skipped']}"
    return f"{size}; {facts['differing']} outputs differ between it and the interpreter"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def verdict(report: dict[str, Any]) -> list[str]:
    """Return what to know where the pruned artifact is hardly faster; nothing where it is."""
    slow = [b for b, timed in report["latency"].items() if timed["pruned"]["speedup"] < 1.1]
    if not slow:
        return []
    widths = [pair for pair in report["convolutions"] if pair[0] > 1]  # the image has one channel
    odd = sum(any(width % 8 for width in pair) for pair in widths)
    return [
        f"little or no gain at {' and '.join(slow)}: {odd} of {len(widths)} convolutions have "
        "widths that are no multiple of 8,",
        "for which ONNX Runtime leaves its blocked kernels, and channels are selected by copies "
        f"{report['copies']} times",
    ]
