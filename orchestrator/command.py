"What every command shares: how errors end it, and with which exit code."

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from learner.errors import UsageError, UserError
from orchestrator.command_line import parse
from orchestrator.config import Config

KEPT = "the epochs that were done are in history.csv"


def command(name: str, run: Callable[[Config], object], argv: Sequence[str] | None = None) -> int:
    """Parse the command line of `python -m orchestrator.NAME` and `run` it.

    The exit code: 0 done, 1 failed, 2 asked for the impossible, 130 Ctrl-C; SIGTERM ends the process with 143.
    """
    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(parse(arguments, name))
        return 0
    except KeyboardInterrupt:
        print(f"\ninterrupted: workers are stopped, {KEPT}", file=sys.stderr)
        return 130
    except UserError as error:
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1, arguments)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}; {KEPT}", 1, arguments)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(143)


def _fail(message: str, code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code
