"The errors that are written for people: one sentence with the value, the rule and the remedy."

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    "Something failed for a reason that a user can act on; its text is complete without a traceback."


class UsageError(UserError):
    "What was asked for cannot be done as asked: refused before anything starts."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    "' (did you mean X?)' for the known name that is nearest, or nothing."
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
