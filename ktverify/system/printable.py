"""Text of others, an engine's error above all, made fit for a terminal, a page and a file."""

from __future__ import annotations

import re

# more is cut: a record of a run and a page have room for this many characters, one line on a terminal for the second
MOST, MOST_OF_A_LINE = 20_000, 2_000
# what a terminal acts on, JSON and XML cannot contain, or a reader does not see: control characters but tab and line
# end, lone surrogates, line separators, and marks that turn the direction of writing
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str, most: int = MOST) -> str:
    """The text with every unfit character written as its escape (\\x1b), cut in its middle to `most` characters."""
    if len(text) > most:
        # cut first, so that a text of gigabytes costs no more than its ends
        text = _cut(text, most)
    return _cut(_UNFIT.sub(_escape, text.replace("\r\n", "\n")), most)


def shown_line(text: str, most: int = MOST_OF_A_LINE) -> str:
    """`shown`, without line ends and repeated spaces."""
    return " ".join(shown(text, most).split())


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = (most - 40) // 2
    return f"{text[:half]} … {len(text) - 2 * half} more characters … {text[-half:]}"


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
