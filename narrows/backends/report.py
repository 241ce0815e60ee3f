"""The text that an artifact tells of itself, from its manifest alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from narrows.files.quoting import plain


def describe(manifest: Mapping[str, Any]) -> str:
    """Return the report: what goes in and out, how it was checked, what was kept and why."""
    lines = [*_head(manifest), *_checks(manifest["fidelity"]), *_notes(manifest["notes"])]
    lines += [*_forms(manifest.get("contest")), *_gains(manifest)]
    return "\n".join(plain(line, None) for line in lines)


def _head(manifest: Mapping[str, Any]) -> Iterator[str]:
    size = sum(file["size"] for file in manifest["files"].values())
    yield f"{manifest['name']}: {manifest['target']}, {size:,} bytes"
    for label in ("inputs", "outputs"):
        for spec in manifest[label]:
            shape = ",".join(map(str, spec["shape"]))
            yield f"  {label[:-1]:8}{spec['name']}  {spec['dtype']}[{shape}]"
    for state in manifest.get("states", ()):
        sizes, whole = ("x".join(map(str, state[key])) for key in ("sizes", "whole"))
        left = f"{whole} channels" if state["kept"] is None else f"{sizes} of {whole} channels"
        yield f"  state   {state['name']}  goes in again from output {state['output']}, {left}"
    if manifest["passes"]:
        yield f"  passes  {', '.join(manifest['passes'])}"


def _checks(fidelity: Mapping[str, Any]) -> Iterator[str]:
    if not fidelity:
        yield "  not checked against the program"
        return
    for check in fidelity["checked"]:
        inputs = "1 input" if check["inputs"] == 1 else f"{check['inputs']} inputs"
        yield f"  checked batch {check['batch']}, {inputs}: relative error {check['error']:.1e}"
    yield f"          (limit {fidelity['tolerance']:.0e} of the largest output)"


def _notes(notes: list[Mapping[str, Any]]) -> Iterator[str]:
    kept = [note for note in notes if note["channels"]]
    remarks = [note for note in notes if not note["channels"]]
    if kept:
        total = sum(note["channels"] for note in kept)
        yield f"kept {_channels(total)} that the plan drops, or that nothing needs, because of:"
    by_reason: dict[str, list[Mapping[str, Any]]] = {}
    for note in kept:
        by_reason.setdefault(note["reason"], []).append(note)
    # The reason that costs most stands first.
    order = sorted(by_reason, key=lambda r: -sum(n["channels"] for n in by_reason[r]))
    for reason in order:
        group = by_reason[reason]
        yield f"  {reason}: {_channels(sum(n['channels'] for n in group))}"
        for note in group:
            yield f"    {_line(note)} ({note['channels']})"
    if remarks:
        yield "notes:"
    for note in remarks:
        yield f"  {_line(note)}"


def _forms(contest: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield which forms were tried, with their times."""
    if contest is None:
        return
    if "why" in contest:
        yield f"form: {contest['winner']}, by the cost table alone: {contest['why']}"
        return
    yield f"forms tried in {contest['numbers']}, batch {contest['batch']}, one thread:"
    for form in contest["forms"]:
        if "measured_ms" in form:
            said = f"measured {form['measured_ms']:g} ms"
        else:
            same = form.get("same_as")
            said = f"the same program as {same}" if same else f"not timed: {form.get('failed')}"
        wins = "  ships" if form["form"] == contest["winner"] else ""
        yield f"  {form['form']:18} predicted {form['predicted_ms']:g} ms, {said}{wins}"


GAINS = (
    ("parameters", "parameters", ""),
    ("bytes", "bytes", ""),
    ("predicted_ms", "predicted", " ms, by the cost table"),
    ("measured_ms", "measured", " ms here"),
)  # fmt: skip


def _gains(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a compile came to: sizes and times, before and after."""
    gain = manifest.get("gain", {})
    for key, name, unit in GAINS:
        if key in gain:
            before, after = gain[key]
            share = f"  ({after / before:.2f})" if before else ""
            yield f"{name:10} {before:,} -> {after:,}{unit}{share}"


def _line(note: Mapping[str, Any]) -> str:
    source = f"  {note['source']}" if note["source"] else ""
    return f"{note['where']}: {note['message']}{source}"


def _channels(count: int) -> str:
    return "1 channel" if count == 1 else f"{count:,} channels"
