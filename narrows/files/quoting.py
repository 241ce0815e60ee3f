"""How a name that somebody chose becomes part of a text: one function per language.

A name may hold anything: quotes, ends of comments, ends of lines, characters that turn a line
around. What comes out reads like the name, and ends nothing.
"""

from __future__ import annotations

import re
from html import escape

LONGEST = 200  # characters of a name that a line shows

C_LONGEST = 48  # of an identifier; C tells 63 characters apart, and a prefix comes before


def plain(text: str, longest: int | None = LONGEST) -> str:
    """Return a text for a line of plain text: it stays one line, and steers no terminal."""
    shown = text[:longest]
    if not shown.isprintable():
        shown = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown
        )
    return shown if longest is None or len(text) <= longest else f"{shown}..."


def block(text: str) -> str:
    """Return a text of several lines, which stay; it steers no terminal."""
    return "\n".join(plain(line, None) for line in text.split("\n"))


def c_comment(text: str) -> str:
    """Return a text for the inside of a C comment: it stays one line, and ends no comment."""
    return plain(text).replace("*/", "* /").replace("/*", "/ *")


def html(text: str) -> str:
    """Return a text for the inside of an HTML element or of a quoted attribute."""
    return escape(plain(text))


def c_name(text: str) -> str:
    """Return a text as part of a C identifier, to which the caller adds what makes it unique."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text[:C_LONGEST])


def is_prefix(text: str) -> bool:
    """Whether C identifiers can begin with a text, before an underscore: ``net``, but also ``int``,
    which is no keyword there."""
    return len(text) <= C_LONGEST and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text) is not None
