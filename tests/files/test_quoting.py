"""Names that try to become code, in every language that narrows writes."""

from __future__ import annotations

import pytest

from narrows.files.quoting import block, c_comment, c_name, html, is_prefix, plain

NASTY = [
    "a\n#error owned\n",
    "*/ int evil(void){return 1;} /*",
    "*/*/*/",
    "/*/",
    "\u202e\u2066",
    "\ud800",
    "\x1b[31m",
    "??/\n",
    "<script>alert(1)</script>\"'&",
    "x" * 10_000,
    "",
]


@pytest.mark.parametrize("name", NASTY)
def test_a_comment_stays_one_line_and_ends_nothing(name: str):
    text = c_comment(name)
    assert "*/" not in text
    assert "/*" not in text
    assert text.isprintable()
    assert len(text) < 300
    text.encode()


@pytest.mark.parametrize("name", NASTY)
def test_html_holds_no_markup(name: str):
    assert not set(html(name)) & set("<>\"'\n")


@pytest.mark.parametrize("name", NASTY)
def test_an_identifier_is_letters(name: str):
    assert c_name(name).isascii()
    assert c_name(name).replace("_", "").isalnum() or not c_name(name).replace("_", "")
    assert len(c_name(name)) < 64


def test_plain_text_is_left_as_it_is():
    assert plain("layer.0: größer (net.py:3)") == "layer.0: größer (net.py:3)"
    assert plain("a\tb\n") == "a\\tb\\n"
    assert plain("x" * 10_000, None) == "x" * 10_000


def test_a_text_of_lines_keeps_them():
    assert block("what\n  at \x1b[31m\r\u202e") == "what\n  at \\x1b[31m\\r\\u202e"


@pytest.mark.parametrize("text", ["int", "main", "a1_b"])
def test_prefixes(text: str):
    assert is_prefix(text)


@pytest.mark.parametrize("text", ["", "1a", "_a", "a b", "a;", "x" * 10_000, "ä", "a\n"])
def test_what_is_no_prefix(text: str):
    assert not is_prefix(text)
