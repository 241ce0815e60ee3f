"""Where a node came from: the user's source line, the module's path, and the name made of it.

`torch.export` leaves a Python stack and a stack of modules on every node. The innermost frame
outside the torch package is the user's; frames of torchvision or timm count as the user's too.
"""

from __future__ import annotations

import os
import re
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import TracerBase

from narrows.ir.meta import Meta, op_name
from narrows.ir.module import ANNOTATION

_TORCH = os.path.join(os.path.abspath(torch.__path__[0]), "")
# What stands between torch and a model; the demo's network is a model like any other.
_NARROWS = tuple(
    os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), part)
    for part in (f"frontend{os.sep}", f"ir{os.sep}", f"api{os.sep}")
)
_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+)', re.MULTILINE)
# What `torch.fx` calls the file of the code it generates for a GraphModule.
_GENERATED = "<eval_with_key>"


def is_user_file(path: str) -> bool:
    """Tell whether a frame in ``path`` is the user's rather than torch's, Python's or ours."""
    return not path.startswith((_TORCH, *_NARROWS, "<"))


@lru_cache(maxsize=4096)
def short_path(path: str) -> str:
    """Return ``path`` below site-packages or the working directory where it lies there."""
    for marker in ("site-packages", "dist-packages"):
        head, found, tail = path.rpartition(f"{os.sep}{marker}{os.sep}")
        if found and head:
            return tail
    here = os.getcwd() + os.sep
    return path[len(here) :] if path.startswith(here) else path


def frames(stack: str) -> Iterator[tuple[str, int, str]]:
    """Yield ``(file, line, code)`` of a printed Python stack, innermost first."""
    found = list(_FRAME.finditer(stack))
    for match in reversed(found):
        code = stack[match.end() :].split("\n", 2)[1:2]
        text = code[0].strip() if code else ""
        yield match.group(1), int(match.group(2)), "" if text.startswith('File "') else text


def user_frame(stack: str, generated: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Return ``("file.py:12", code)`` of the innermost user frame, or two empty strings.

    Args:
        stack: A stack as Python prints it.
        generated: For code that `torch.fx` generated, the user's stack by the name assigned to.
    """
    for path, line, code in frames(stack):
        if is_user_file(path):
            return f"{short_path(path)}:{line}", code
        if path.startswith(_GENERATED) and generated:
            original = generated.get(code.partition(" = ")[0].strip())
            if original:
                return user_frame(original)
    return "", ""


def model_frames(stack: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Return the frames of the model's own code: those below the capture's that are not torch's."""
    frames = list(stack)
    ours = [i for i, f in enumerate(frames) if f.filename.startswith(_NARROWS)]
    return [
        f
        for f in frames[ours[-1] + 1 if ours else 0 :]
        if is_user_file(f.filename) or f.filename.startswith(_GENERATED)
    ]


@contextmanager
def full_stacks() -> Iterator[None]:
    """Let torch.export record every frame of the model's code on a node.

    By itself it keeps the frames of functions called ``forward`` alone, and an operator in a
    function that forward calls would be placed at the call. Where torch has no such filter, nothing
    changes.
    """
    name = "_filter_traceback_frames"
    original = TracerBase.__dict__.get(name)
    if original is None:
        yield
        return

    def keep(tracer: Any, stack: traceback.StackSummary) -> traceback.StackSummary:
        return traceback.StackSummary.from_list(model_frames(stack))

    setattr(TracerBase, name, keep)
    try:
        yield
    finally:
        setattr(TracerBase, name, original)


def generated_stacks(model: torch.nn.Module) -> dict[str, str]:
    """Return the user's stack for every node of a GraphModule that remembers one."""
    if not isinstance(model, fx.GraphModule):
        return {}
    return {n.name: n.stack_trace for n in model.graph.nodes if n.stack_trace}


def set_provenance(
    node: fx.Node, exported: Mapping[str, Any], generated: Mapping[str, str]
) -> None:
    """Fill ``Meta.source``, ``code`` and ``module`` from the meta that `torch.export` left."""
    meta = Meta(node)
    own = (exported.get("custom") or {}).get(ANNOTATION)
    if own is not None:
        meta.source, meta.code, meta.module = own["source"], own["code"], own["module"]
        return
    meta.source, meta.code = user_frame(exported.get("stack_trace") or "", generated)
    meta.module = _innermost(exported)[1]


def _innermost(exported: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the key of the module call, the module's path and its class, as strings."""
    stack = exported.get("nn_module_stack")
    if not stack:
        return "", "", ""
    key, (path, kind) = next(reversed(stack.items()))
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return key, path, kind


def choose_names(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Return the name each ``call_function`` node should have; they need not be unique yet.

    The only operator of a leaf module of torch.nn has the module's path, any other operator the
    path and its own name.
    """
    calls = {n: _innermost(n.meta) for n in nodes if n.op == "call_function"}
    ops = Counter(key for key, _, _ in calls.values())
    names = {}
    for node, (key, path, kind) in calls.items():
        own = (node.meta.get("custom") or {}).get(ANNOTATION)
        if own is not None:
            names[node] = own["name"]
            continue
        alone = path and kind.startswith("torch.nn.") and ops[key] == 1
        op = op_name(node).partition(".")[0].strip("_")
        name = path if alone else f"{path}.{op}" if path else op
        names[node] = name.replace(".", "_")
    return names
