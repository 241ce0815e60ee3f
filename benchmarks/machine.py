"""What a benchmark's numbers depend on, and how its results are written down."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "torchvision", "onnxruntime", "apple-upscale", "torch-pruning", "timm")


def describe() -> dict[str, Any]:
    """Return the processor, the core count, and the versions of Python and the packages."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def fingerprint(folders: Iterable[str]) -> str:
    """Return a hash of all files in folders of this repository: results of other code differ."""
    return digest(ROOT, sources(ROOT, *folders))


def digest(tree: Path, paths: Iterable[Path]) -> str:
    """Return the hash of files: of their names in a tree and their content."""
    made = hashlib.sha256()
    for path in sorted(paths):
        made.update(f"{path.relative_to(tree)}\0".encode())
        made.update(hashlib.sha256(path.read_bytes()).digest())
    return made.hexdigest()[:16]


def sources(tree: Path, *folders: str) -> list[Path]:
    """Return the files of folders of a tree, without what Python compiled."""
    found = (p for folder in folders for p in (tree / folder).rglob("*") if p.is_file())
    return [p for p in found if "__pycache__" not in p.parts]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table whose columns line up."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def render(line: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([render(lines[0]), rule, *map(render, lines[1:])])


def write(path: str | None, results: Any) -> None:
    """Write the results with the machine's description as JSON, if there is a path."""
    if path is not None:
        text = json.dumps({"machine": describe(), "results": results}, indent=1)
        Path(path).write_text(text + "\n")
        print(f"wrote {path}", file=sys.stderr)
