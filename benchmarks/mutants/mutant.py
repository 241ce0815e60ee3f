"""What a mutant is: one small change of one file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A change.

    Attributes:
        file: The file, from the root.
        line: The line in which the change starts, from 1.
        kind: What sort of mistake it is.
        start: The first byte that is replaced.
        before: What stands there.
        after: What is put there.
    """

    file: str
    line: int
    kind: str
    start: int
    before: str
    after: str

    @property
    def key(self) -> str:
        """What the log knows it by, for one state of narrows."""
        return f"{self.file}:{self.start}:{self.kind}:{self.after}"

    @property
    def change(self) -> str:
        """The change in words, on one line."""
        before, after = (" ".join(t.split()) for t in (self.before, self.after))
        return f"{self.kind}: `{_short(before)}` -> `{_short(after)}`"

    def applied(self, text: bytes) -> bytes:
        """Return the file's text with the change."""
        end = self.start + len(self.before.encode())
        assert text[self.start : end] == self.before.encode(), self
        return text[: self.start] + self.after.encode() + text[end:]


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
