"The errors that are written for people: one sentence with the value, the rule and the remedy."

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

# C0, DEL, C1, other ends of lines, and what turns the direction of writing
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
LONGEST, LONGEST_LINE = 200, 1500  # characters of a value that a sentence shows, and of the sentence


class UserError(Exception):
    "Something failed for a reason that a user can act on; its text is complete without a traceback."


class UsageError(UserError):
    "What was asked for cannot be done as asked: refused before anything starts."


def printable(text: str) -> str:
    "The text as a terminal may have it: control characters but line ends escaped, the middle of long lines cut out."
    escaped = re.sub(rf"(?!\n){CONTROL}", _escape, text)
    return re.sub(rf"(?m)^(.{{{LONGEST_LINE}}}).*?(.{{{LONGEST}}})$", r"\1 ... \2", escaped)


def _escape(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


def shown(value: object) -> str:
    "A value as a sentence shows it, on one line: cut where it is long or deep."
    text = re.sub(CONTROL, _escape, value) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def lacks_memory(error: BaseException) -> bool:
    "Whether it says that memory is not enough: Python's, a GPU's, or as torch has it on CPUs, without a class."
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    "' (did you mean X?)' for the known name that is nearest, or nothing."
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
