"""The compiler's process: reads a job, compiles it with TVM, writes the result.

``python -m narrows.backends.tvm.worker FOLDER``. torch is kept out: the artifact must not need it,
and forked children of a process that holds its threads hang.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from narrows.backends.tvm.compiler_files import JOB, RESULT, WEIGHTS

REPORT = "report this with the model; target onnx does not need TVM"


def main(folder: Path) -> None:
    """Run the job of a folder."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    if job["options"]["importer"] == "narrows":
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import numpy as np

    from narrows.backends.tvm.build import BuildError, build
    from narrows.backends.tvm.lowering import RuleError
    from narrows.backends.tvm.module import MissingRulesError

    with np.load(folder / WEIGHTS) as stored:
        weights = {name: stored[name] for name in stored.files}
    result: dict[str, Any]
    try:
        result = build(job, weights, folder, tell)
    except MissingRulesError as error:
        result = {"missing": error.found}
    except RuleError as error:
        result = {"node": error.node, "why": error.why}
    except BuildError as error:
        result = {"failed": str(error), "hint": error.hint}
    except Exception as error:  # TVM's own errors share no base, and their text runs to pages
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()]
        last = lines[-1].strip() if lines else ""
        result = {"failed": f"{type(error).__name__}: {last}", "hint": REPORT}
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


def tell(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
