"The errors that are written for people: one sentence with the value, the rule and the remedy."

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

# C0 but tab and line end, DEL, C1, other ends of lines, and what turns the direction of writing
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"


LONGEST = 200  # characters of a value that a sentence shows


class UserError(Exception):
    "Something failed for a reason that a user can act on; its text is complete without a traceback."


class UsageError(UserError):
    "What was asked for cannot be done as asked: refused before anything starts."


def printable(text: str) -> str:
    "The text with control characters as their escapes, but for line ends: no file's name may drive the terminal."
    return re.sub(CONTROL, lambda found: repr(found[0])[1:-1], text)


def shown(value: object) -> str:
    "A value as a sentence shows it: cut where it is long or deep."
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    "' (did you mean X?)' for the known name that is nearest, or nothing."
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
