"""Names as a terminal may be given them.

What came from a disk can hold characters that a terminal obeys: colours, moves of the cursor, titles of windows, text
that runs the other way. `shown` spells them out as Python would.

Messages of `UserError` pass through here when they are made, and what the commands print by `console.say`.
"""

from __future__ import annotations

import unicodedata

OBEYED = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})  # Unicode categories: controls, formats (bidi), line breaks

LONGEST = 80  # characters of a name or value in a message


def shown(text: str) -> str:
    """Text as it may reach a terminal: control, bidirectional and line-breaking characters spelled as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if unicodedata.category(c) in OBEYED else c for c in text)


def counted(n: int, noun: str) -> str:
    """`1 unit`, `2,000 units`: a number and its noun, in the plural unless it is one."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def one_line(text: str) -> str:
    """`shown`, with what was several lines joined by spaces."""
    return shown(" ".join(map(str.strip, text.split("\n")))) if "\n" in text else shown(text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
