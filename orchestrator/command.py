"What every command shares: how errors end it, and with which exit code."

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from cluster.signals import shielded
from learner.errors import UsageError, UserError, lacks_memory, printable
from orchestrator.stop import Interrupted, too_late

if TYPE_CHECKING:
    from orchestrator.config import Config

# what is left where a command is cut short: one that trains, one that looks at a finished run
KEPT = "epochs that were done, if any, are in history.csv"
UNCHANGED = "the run's files are as they were"

_ended_by: list[int] = []  # the signal

REMEDIES = {
    errno.ENOSPC: "make room, or name another disk with --runs DIR",
    errno.EDQUOT: "make room, or name another disk with --runs DIR",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "have its disk take what is written again, or name another one with --runs DIR",
}


def options(argv: Sequence[str], name: str) -> Config:
    "The command line as a Config."
    from orchestrator.command_line import parse  # here, where a Ctrl-C is heard: it takes longer than all before

    return parse(argv, name)


def command(
    name: str,
    run: Callable[[Any], object],
    argv: Sequence[str] | None = None,
    read: Callable[[Sequence[str], str], Any] = options,
    kept: str = KEPT,
) -> int:
    """`read` the command line of `python -m orchestrator.NAME` and `run` what it asks for.

    `kept` says what is left of one that was cut short. The exit code: 0 done, 1 failed, 2 asked for the impossible,
    130 Ctrl-C, 141 nobody reads on what is printed, 143 SIGTERM, 129 the end of its terminal (SIGHUP, but under nohup).
    """
    arguments = sys.argv[1:] if argv is None else argv
    _hear()
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may be any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in arguments
    try:
        _refuse_lost_place()
        with shielded():  # it brings numpy, which starts threads
            config = read(arguments, name)
        debug = debug or getattr(config, "debug", False)
        _start_threads()
        run(config)
        return 0
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print(f"\ninterrupted: workers are stopped, {kept}", file=sys.stderr)
        return 130
    except SystemExit:
        if not _ended_by:  # --help
            raise
        with suppress(OSError):  # the terminal may be gone
            print(f"\nended from outside: workers are stopped, {kept}", file=sys.stderr)
        return 128 + _ended_by[0]
    except (UserError, MemoryError, RuntimeError, OSError) as error:
        return _end_by(error, kept, debug)


def _start_threads() -> None:
    """Have the threads of numpy and torch, which live on, never be the ones to hear of SIGTERM and SIGHUP.

    While Ray starts this one does not (see OwnCluster), and C++ of Ray's that ends the process would run in theirs.
    """
    with shielded():
        import torch

        torch.ones(2**16 * torch.get_num_threads()).exp()  # enough that each thread has its part


def _end_by(error: Exception, kept: str, debug: bool) -> int:
    "Say what was wrong, if it is nothing of ours; the exit code."
    if isinstance(error, UserError):
        told = [str(error), *_notes(error)]
        text = ("\n" if "\n" in told[0] else "; ").join(told)
        return _fail(text, 2 if isinstance(error, UsageError) else 1, debug)
    if lacks_memory(error):
        return _fail(f"there is not enough memory: {error}; lower --size or --batch-size; {kept}", 1, debug)
    if isinstance(error, BrokenPipeError) and _reader_has_left():
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError):
        return _fail(_told_of_the_system(error, kept), 1, debug)
    raise error


def _told_of_the_system(error: OSError, kept: str) -> str:
    place = f": {error.filename}" if error.filename else ""
    remedy = [REMEDIES[error.errno]] if error.errno in REMEDIES else []
    return "; ".join([f"{error.strerror or error}{place}", *remedy, kept, *_notes(error)])


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def leave(code: int) -> NoReturn:
    "Exit; a Ctrl-C that comes now changes nothing any more."
    too_late()
    sys.exit(code)


def _refuse_lost_place() -> None:
    "Libraries fail in their own ways where the folder that a command is called in has been removed."
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the folder that this is called in was removed: cd to one that is there") from None


def _reader_has_left() -> bool:
    "Whether who reads what is printed here (head, less) has enough; then what is left for it is let go of."
    reader = select.poll()
    reader.register(1, 0)
    left = any(event & select.POLLERR for _, event in reader.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return left


def _hear() -> None:
    "From here on, SIGTERM and SIGHUP end what is done in order."
    _ended_by.clear()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)


def _terminate(number: int, frame: object) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    _ended_by.append(number)  # since within Ray's C++ the code is lost
    raise SystemExit(128 + number)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {printable(message)}", file=sys.stderr)
    return code
