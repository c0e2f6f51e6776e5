"""What the three commands share at the terminal: one-line errors with exit status 2, signals, a progress bar.

`python -m storage`, `python -m pipeline` and `python -m trainer` all end in `run_command`, so that a mistake in the
input is one clear line and never a traceback, wherever it was found.
"""

from __future__ import annotations

import argparse
import codecs
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from tqdm import tqdm

from storage.base.errors import UserError
from storage.base.extras import what_to_install
from storage.base.options import values_joined
from storage.base.programs import as_called, keep_to_own_modules
from storage.base.shown import shown

EXIT_OK = 0
EXIT_FAILED = 1  # the work was done and something in it failed (a sample, a check)
EXIT_USAGE = 2  # the input was wrong; nothing was done
EXIT_INTERRUPTED = 130  # 128 + SIGINT, after SIGTERM too
EXIT_NOBODY_READS = 141  # 128 + SIGPIPE: the program behind a pipe, such as `head`, has seen enough

LOG_EVERY_S = 10.0  # between the lines of a bar in a log
TICK_S = 1.0  # between two looks of a bar that nothing moves

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what batch systems send


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, and which takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, except that a switch takes no positional argument for its value."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(values_joined(self, words), namespace)

    def error(self, message: str) -> NoReturn:
        """Print `prog: error: message (see prog --help)` and exit with status 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run_program(main: Callable[[Sequence[str]], int], prog: str) -> NoReturn:
    """`run_command` on what this process was called with; what it starts looks for no module in the user's folder."""
    keep_to_own_modules(os.environ)
    run_command(main, prog)


def run_command(main: Callable[[Sequence[str]], int], prog: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main(argv)` and exit with its status; `UserError`, `OSError` and a package that is not installed become one
    line and status 2.

    Ctrl-C and SIGTERM, whenever they come, end with status 130 and one line; what was published before them stays.
    """
    _make_output_safe()
    # Also where SIGINT was ignored at the start, as it is for what a script puts into the background.
    if threading.current_thread() is threading.main_thread():
        for number in INTERRUPTS:
            signal.signal(number, _interrupt)
    _interrupted.clear()
    speak_as(prog)
    try:
        _require_directory()
        status = main(sys.argv[1:] if argv is None else argv)
        if _interrupted.is_set():
            raise KeyboardInterrupt
    except UserError as error:
        say_error(as_called(" ".join(str(error).split())))
        status = EXIT_USAGE
    except ModuleNotFoundError as error:
        remedy = what_to_install(error, prog)
        if remedy is None:  # no package of ours to name, so a fault of ours
            raise
        say_error(str(remedy))
        status = EXIT_USAGE
    except BrokenPipeError:
        status = EXIT_NOBODY_READS
    except OSError as error:
        if error.errno is None:  # not the operating system's answer, so a fault of ours
            raise
        say_error(f"{error.strerror}: {shown(_text(error.filename))}")
        status = EXIT_USAGE
    except KeyboardInterrupt:
        _say_as("interrupted; what was finished is kept, the same command goes on from there")
        status = EXIT_INTERRUPTED
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = EXIT_NOBODY_READS
    if status == EXIT_NOBODY_READS:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
    sys.exit(status)


_speaker = [""]  # what this process runs: the program, and once it is known its command


def speak_as(name: str) -> None:
    """From here on this process's errors are those of `python -m trainer score`, say."""
    _speaker[0] = name


def say_error(message: str) -> None:
    """Print `python -m trainer score: error: message` on stderr."""
    _say_as(f"error: {message}")


def _say_as(message: str) -> None:
    print(f"{_speaker[0]}: {message}", file=sys.stderr)


def say(*lines: str, flush: bool = False) -> None:
    """Print lines for people: names in them, whoever chose those, cannot steer the terminal."""
    for line in lines:
        print(shown(line), flush=flush)


def _text(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes) else str(name or "")


def _require_directory() -> None:
    """Raises UserError when the current directory was deleted: relative paths mean nothing, and libraries crash."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory is gone; cd into one that is there") from None


SPELLED = str.maketrans({"×": "x", "·": "#", "→": "->", "…": "...", "−": "-"})


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler: what an output cannot take in other letters, or as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(SPELLED)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _make_output_safe() -> None:
    """Let nothing that is printed end the work: an output of another encoding, or one that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would take its place, and be printed into
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    codecs.register_error("spelled", _spell)
    sys.stdout = sys.stdout or os.fdopen(1, "w")  # None: Python has found it closed
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spelled")


_interrupted = threading.Event()  # what is raised inside a callback or a finaliser is lost, the note is not


def _interrupt(number: int, frame: object) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


@dataclass
class Stop:
    """The signal that asked the work to end, if any; whoever works looks at it between two pieces of work."""

    signal: int | None = None


@contextmanager
def stop_on_signals(*numbers: int, answer: str = "") -> Iterator[Stop]:
    """Note the first of these signals instead of raising wherever it happens to arrive; a second Ctrl-C raises at once.

    `answer` is printed on stderr at once, since what is in hand may take a while to end.

    An exception raised inside a library's callback can be swallowed there, and the signal with it; a note cannot. A
    signal that was swallowed before is noted at once, as a Ctrl-C.
    """
    stop = Stop(signal=signal.SIGINT if _interrupted.is_set() and signal.SIGINT in numbers else None)

    def note(number: int, frame: object) -> None:
        stop.signal = number
        if answer:  # written past Python's buffers, in which the signal may have arrived
            with suppress(OSError):
                os.write(2, f"\n{answer}\n".encode())
        signal.signal(signal.SIGINT, signal.default_int_handler)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    before = {number: signal.signal(number, note) for number in numbers} if in_main_thread else {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _AliveBar(tqdm):
    """A bar whose clock goes on while nothing moves it, so that slow work between two updates is not taken for a halt.

    Cost: a thread that wakes once a second.
    """

    def __init__(self, **settings: Any) -> None:
        self._over = threading.Event()
        super().__init__(**settings)
        if not self.disable:
            threading.Thread(target=self._tick, name="bar", daemon=True).start()

    def _tick(self) -> None:
        shown_s = self.start_t
        while not self._over.wait(min(TICK_S, self.mininterval)):
            with self.get_lock():
                if self.disable:
                    return
                now_s = time.time()  # as tqdm does
                # Not `last_print_t`, from which the rate is made.
                if now_s - max(shown_s, self.last_print_t) >= max(TICK_S, self.mininterval):
                    self.display()
                    shown_s = now_s

    def close(self) -> None:
        """Leave the bar as it is."""
        self._over.set()
        super().close()


def progress_bar(
    total: int, *, unit: str, done: int = 0, description: str = "", unit_scale: bool = False, hidden: bool = False
) -> tqdm[NoReturn]:
    """A bar on stderr with done, total, rate and ETA; a line every 10 s when stderr is not a terminal.

    Rate and ETA are of what is done after the `done`.
    """
    return _AliveBar(
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit_scale,
        desc=shown(description),
        mininterval=0.5 if sys.stderr.isatty() else LOG_EVERY_S,
        dynamic_ncols=True,
        smoothing=0.1,
        disable=hidden,
    )
