"""The commands that look: passes, ops, couplings, why, show, diff."""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path
from typing import Any

from narrows.cli.commands import print_json
from narrows.cli.dumps import open_dump
from narrows.cli.flags import refuse_idle
from narrows.cli.model import SOURCE
from narrows.errors import UsageError, suggest
from narrows.ir.dump import split_stage
from narrows.ir.snapshot import Snapshot
from narrows.ir.text import bracket, columns, render, shape_text, short_op


def passes(arguments: argparse.Namespace) -> int:
    """List the passes: name, options with their defaults, fidelity, one line."""
    from narrows.passes.catalog import lookup, providers

    entries = []
    for name in sorted(providers()):
        cls = lookup(name)
        fidelity, requires = cls.fidelity.value, list(cls.requires)
        entries.append(_entry(cls, fidelity=fidelity, requires=requires))
    if arguments.json:
        print_json(entries)
        return 0
    rows = [(_spelled(e), e["fidelity"], e["summary"]) for e in entries]
    print("\n".join(columns(rows, (60, 8, 200))))
    return 0


def criteria(arguments: argparse.Namespace) -> int:
    """List the criteria: name, options, data they need, the sides they score, one line."""
    from narrows.passes.choosing.criteria.catalog import CRITERIA

    entries = []
    for cls in map(CRITERIA.lookup, CRITERIA.providers()):
        facts = {"data": cls.data, "sides": list(cls.sides), "paper": cls.paper}
        entries.append(_entry(cls, **facts, comparable=cls.comparable))
    if arguments.json:
        print_json(entries)
        return 0
    head = ("criterion", "needs", "scores", "what")
    rows = [(_spelled(e), e["data"] or "weights", _sides(e), e["summary"]) for e in entries]
    print("\n".join(columns([head, *rows], (48, 12, 16, 200))))
    return 0


def budgets(arguments: argparse.Namespace) -> int:
    """List the budgets: name, options, unit, one line."""
    from narrows.passes.choosing.budgets.catalog import BUDGETS

    found = map(BUDGETS.lookup, BUDGETS.providers())
    entries = [_entry(cls, unit=cls.unit, coupled=cls.coupled, paper=cls.paper) for cls in found]
    if arguments.json:
        print_json(entries)
        return 0
    rows = [(_spelled(e), e["unit"], e["summary"]) for e in entries]
    print("\n".join(columns([("budget", "counts", "what"), *rows], (40, 24, 200))))
    return 0


def allocators(arguments: argparse.Namespace) -> int:
    """List the allocators: name, options, one line."""
    from narrows.passes.choosing.allocators.catalog import ALLOCATORS

    found = map(ALLOCATORS.lookup, ALLOCATORS.providers())
    entries = [_entry(cls, paper=cls.paper) for cls in found]
    if arguments.json:
        print_json(entries)
        return 0
    rows = [(_spelled(e), e["summary"]) for e in entries]
    print("\n".join(columns([("allocator", "what"), *rows], (48, 200))))
    return 0


def compensations(arguments: argparse.Namespace) -> int:
    """List the compensations: name, options, what they go by, one line."""
    from narrows.passes.choosing.compensations.catalog import COMPENSATIONS, needs_data

    entries = []
    for cls in map(COMPENSATIONS.lookup, COMPENSATIONS.providers()):
        reads = {True: "pruned", False: "unpruned", None: ""}[getattr(cls, "reads_pruned", None)]
        entries.append(_entry(cls, data=needs_data(cls), reads=reads, paper=cls.paper))
    if arguments.json:
        print_json(entries)
        return 0
    head = ("compensation", "needs", "reads", "what")
    rows = [
        (_spelled(e), "inputs" if e["data"] else "weights", e["reads"], e["summary"])
        for e in entries
    ]
    print("\n".join(columns([head, *rows], (56, 8, 9, 200))))
    return 0


def _entry(cls: Any, **facts: Any) -> dict[str, Any]:
    """Return what a class of a catalog says of itself: name, options, the first line, facts."""
    import dataclasses

    from narrows.passes.spelling import default_of, spell_value

    options = {
        f.name.replace("_", "-"): "required"
        if default_of(f) is dataclasses.MISSING
        else spell_value(default_of(f))
        for f in dataclasses.fields(cls)
    }
    summary = (cls.__doc__ or "").strip().splitlines()
    told = summary[0] if summary else ""
    return {"name": cls.name, "options": options, **facts, "summary": told}


def _spelled(entry: dict[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in entry["options"].items())
    return entry["name"] + (f"{{{options}}}" if options else "")


def _sides(entry: dict[str, Any]) -> str:
    return ", ".join(entry["sides"])


def ops(arguments: argparse.Namespace) -> int:
    """Print the op table; with a model, what the table lacks for it."""
    from narrows.ir.ops import table

    if arguments.model is None:
        refuse_idle(arguments, SOURCE, "no model is named")
        if arguments.markdown:
            print(table.to_markdown(), end="")
            return 0
        rows = [{"name": r.name, "kind": r.kind, "summary": r.summary} for r in table.rows()]
        if arguments.json:
            print_json(rows)
        else:
            cells = [(r["name"], r["kind"], r["summary"]) for r in rows]
            print("\n".join(columns(cells, (40, 16, 200))))
        return 0
    from narrows.cli.model import capture_model

    refuse_idle(arguments, ("markdown",), "what a model lacks is not a table of all rows")
    program = capture_model(arguments)
    missing = {op: list(nodes) for op, nodes in table.missing(program).items()}
    if arguments.json:
        print_json({"missing": missing})
    elif missing:
        cells = [(op, f"{len(nodes)}x", " ".join(nodes[:4])) for op, nodes in missing.items()]
        print("\n".join(columns(cells, (40, 6, 100))))
        print("no channel is removed through these: `narrows.ir.ops.table` takes rows from outside")
    else:
        print(f"every operator of {program.name} has a row")
    return 1 if missing else 0


def couplings(arguments: argparse.Namespace) -> int:
    """List the couplings of a model or of a dump's captured program."""
    if Path(arguments.model).is_dir() or ":" not in arguments.model:
        refuse_idle(arguments, SOURCE, "a dump has its program; it goes with MODULE:FACTORY")
        dump, _held = open_dump(arguments.model)
        found, names = dump.couplings, [n.name for n in dump.snapshot("0").nodes]
    else:
        from narrows.cli.model import capture_model
        from narrows.passes.instruments import coupling_records

        program = capture_model(arguments)
        found, names = coupling_records(program), [n.name for n in program.nodes]
    if arguments.node is not None:
        if arguments.node not in names:
            raise _unknown("node", arguments.node, names)
        found = [c for c in found if arguments.node in c["nodes"]]
    if arguments.json:
        print_json(found)
        return 0
    for coupling in found:
        print(coupling_text(coupling))
    return 0


def coupling_text(coupling: dict[str, Any]) -> str:
    """Return one coupling: its width and barrier, then the weight axes that follow it."""
    barrier = f"  stays whole: {coupling['barrier']}" if coupling["barrier"] else ""
    lines = [f"{coupling['name']}  {coupling['width']} channels{barrier}"]
    cells = [(f"  {m['weight']}", f"axis {m['axis']}", m["role"]) for m in coupling["members"]]
    return "\n".join([*lines, *columns(cells, (60, 8, 8))])


def show(arguments: argparse.Namespace) -> int:
    """Print a program of a dump."""
    view = _view(arguments.dump)
    shown = [n for n in view.nodes if _fits(n, arguments.only)]
    if not shown:
        names = [n.name for n in view.nodes]
        raise UsageError(
            f"no node fits {arguments.only!r}", hint=suggest(arguments.only.strip("*"), names)
        )
    if arguments.json:
        data = view.to_json()
        kept = {n.name for n in shown}
        print_json(data | {"nodes": [n for n in data["nodes"] if n["name"] in kept]})
    else:
        print(render(view, weights=arguments.weights, only=arguments.only), end="")
    return 0


def _view(text: str) -> Snapshot:
    """Return the program that ``DUMP@PASS`` names."""
    folder, stage = split_stage(text)
    dump, _held = open_dump(folder)
    return dump.snapshot(stage)


def _fits(node: Any, glob: str) -> bool:
    return any(fnmatch.fnmatchcase(t, glob) for t in (node.name, node.module))


def diff(arguments: argparse.Namespace) -> int:
    """Print what differs between two programs."""
    from narrows.ir.diff import diff as compare

    found = compare(_view(arguments.old), _view(arguments.new))
    if arguments.json:
        print_json(found.to_json())
    else:
        print(found.to_text(), end="")
    return 1 if found else 0


# ------------------------------------------------------------------ why


def why(arguments: argparse.Namespace) -> int:
    """Print what every pass did to a node, what was noted of it, and its couplings."""
    dump, _held = open_dump(arguments.dump)
    stages = [s["name"] for s in dump.stages if s.get("file")]
    views = [dump.snapshot(str(i)) for i in range(len(stages))]
    names = _nodes_meant(views, arguments.node)
    concerned = [c for c in dump.couplings if _concerns(c, names, arguments.node)]
    story = {
        "node": arguments.node,
        "nodes": [_story(stages, views, name) for name in names],
        "notes": _notes(views, names, arguments.node, concerned),
        "couplings": concerned,
    }
    if arguments.json:
        print_json(story)
    else:
        print(_why_text(story), end="")
    return 0


def _nodes_meant(views: list[Snapshot], text: str) -> list[str]:
    """Return the node of that name, or those that read the weight of that name."""
    if any(v.node(text) for v in views):
        return [text]
    readers = dict.fromkeys(n.name for v in views for n in v.nodes if text in n.weights)
    inside = dict.fromkeys(n.name for v in views for n in v.nodes if n.module == text)
    if readers or inside:
        return list(readers or inside)
    known = [*(n.name for v in views for n in v.nodes), *(w for v in views for w in v.weights)]
    raise _unknown("node or weight", text, known)


def _unknown(kind: str, text: str, known: list[str]) -> UsageError:
    return UsageError(
        f"there is no {kind} {text!r}",
        hint=suggest(text, known) or "narrows show DUMP lists the nodes",
    )


def _story(stages: list[str], views: list[Snapshot], name: str) -> dict[str, Any]:
    """Return where a node came from and what it was after every pass."""
    steps: list[dict[str, str]] = []
    first = next(n for v in views if (n := v.node(name)) is not None)
    for stage, view in zip(stages, views, strict=True):
        node = view.node(name)
        if node is None:
            there = any(v.node(name) for v in views[views.index(view) :])
            shape = "not there yet" if there and not steps else "gone"
            steps.append({"pass": stage, "shape": shape, "weights": "", "remark": ""})
            continue
        weights = (view.weights[w] for w in node.weights if w in view.weights)
        widths = " ".join(w.name + shape_text(w.shape, (), w.was) for w in weights)
        shape = node.dtype + shape_text(node.shape, node.dynamic, node.was)
        steps.append({"pass": stage, "shape": shape, "weights": widths, "remark": node.remark})
    return {
        "name": name,
        "op": first.op,
        "module": first.module,
        "source": first.source,
        "code": first.code,
        "steps": steps,
    }


def _notes(
    views: list[Snapshot], names: list[str], text: str, couplings: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the notes about the nodes, their weights, and all nodes that carry their channels."""
    weights = {w for v in views for n in v.nodes if n.name in names for w in n.weights}
    carriers = {n for c in couplings for n in c["nodes"]}
    about = {text, *names, *weights, *carriers}
    found = [vars(n) for v in views for n in v.notes if n.where in about]
    return [n for i, n in enumerate(found) if n not in found[:i]]


def _concerns(coupling: dict[str, Any], names: list[str], text: str) -> bool:
    return any(n in coupling["nodes"] for n in names) or any(
        m["weight"] == text for m in coupling["members"]
    )


def _why_text(story: dict[str, Any]) -> str:
    lines = []
    for node in story["nodes"]:
        lines.append(f"{node['name']}  {short_op(node['op'])}  {bracket(node['source'])}".rstrip())
        lines += [f"    {node['code']}"] if node["code"] else []
        cells = [(f"  {s['pass']}", s["shape"], s["weights"], s["remark"]) for s in node["steps"]]
        lines += columns(cells, (24, 28, 60, 60))
    if story["notes"]:
        cells = [
            (f"  {n['where']}", n["reason"], n["message"], bracket(n["source"]))
            for n in story["notes"]
        ]
        lines += ["notes", *columns(cells, (38, 16, 100, 24))]
    if story["couplings"]:
        lines.append("couplings, as captured")
        for coupling in story["couplings"]:
            lines += [f"  {line}" for line in coupling_text(coupling).splitlines()]
    return "\n".join(lines) + "\n"
