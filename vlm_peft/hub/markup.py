"""Foreign text stays text: what Markdown would take for markup is escaped here, HTML where pages are made."""

import re
from typing import Any

_MARKS = re.compile(
    r"[\\`*{}\[\]<>#|!~$&]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # Between letters it marks nothing.
    r"|:(?=//)|(?<=[wW]{3})\."  # GitHub's Markdown makes links of addresses.
)
_LINE_START = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$)))?([-+=.)])")
# Control characters, halves of characters, and what turns the direction of the text that follows.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Markdown(str):
    """Text that is Markdown already."""


def visible(value: Any) -> str:
    """Returns a value as text: whole numbers with commas, what no page should hold (control characters) as U+FFFD."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _UNSEEN.sub("\ufffd", str(value))


def one_line(value: Any) -> str:
    """As [`visible`], with blanks joined."""
    return visible(" ".join(value.split()) if isinstance(value, str) else value)


def markdown(value: Any) -> str:
    """Returns a value as Markdown that shows just this text, on one line; [`Markdown`] stays as it is."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_LINE_START.sub(r"\1\\\2", _MARKS.sub(r"\\\g<0>", one_line(value))))


def code(value: Any) -> Markdown:
    """Returns a value as a code span, between more backticks than it has in a row."""
    text = one_line(value)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    edge = " " if text[:1] in ("", "`") or text.endswith("`") else ""
    return Markdown(f"{fence}{edge}{text}{edge}{fence}")
