"""`OpenvinoTarget`: the file that `OnnxTarget` writes, held to the program in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.backends.onnx.target import OnnxTarget

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.backends.base import Pair, Track
    from narrows.backends.compare import Wanted
    from narrows.backends.onnx.check import Checked


@dataclass(frozen=True)
class OpenvinoTarget(OnnxTarget):
    """Lowers a program to an ONNX file that runs in OpenVINO.

    Attributes:
        opset, simplify, inline_limit, form: As for `OnnxTarget`.
        check: Whether the model is held to the program in OpenVINO.
        samples: How many inputs the check tries per batch size.
    """

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "one ONNX file, checked in OpenVINO"
    measuring: ClassVar[str] = ""
    measuring_integers: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx", "openvino", "onnxscript", "onnxsim")
    rounds: ClassVar[bool] = False
    checking: ClassVar[str] = "run in OpenVINO against the program, batches of 1, 2 and 5"

    def track(self) -> AbstractContextManager[Track] | None:
        """Return where programs are timed in OpenVINO; see `Target.track`."""
        from narrows.backends.openvino.track import track

        return None if self.available() else track(self.draft)

    @property
    def untimed(self) -> str:
        """Why no program is timed here."""
        return f"OpenVINO does not run here: {self.available()}"

    def _warn(self, manifest: dict[str, Any], model: Any, whole: bool) -> None:
        """Note nothing: OpenVINO cuts off no products, on whatever processor."""

    def _checked(
        self, artifact: Artifact, wanted: Wanted, again: Callable[[], Pair], whole: bool
    ) -> Checked:
        from narrows.backends.openvino.check import check

        return check(artifact, wanted, again, whole)
