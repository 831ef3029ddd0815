"""Where errors end: every failure becomes one paragraph on standard error and an exit status, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from types import FrameType

from xformopt.errors import XformoptError

__all__ = ["run"]

_FAILED, _WRONG_USAGE = 1, 2
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    arguments = _spell_options(arguments) or ["--help"]
    is_debugging = "--debug" in arguments
    try:
        with _terminated_like_interrupted(), _libraries_silenced(not is_debugging):
            return _invoke(arguments)
    except BrokenPipeError:
        # whoever read the output has left, and there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (Exception, KeyboardInterrupt) as error:
        if is_debugging:
            traceback.print_exception(error)
        message, status = _explain(error)
        _print_paragraph(f"xformopt: error: {message}")
        return status


def _invoke(arguments: list[str]) -> int:
    import typer

    from xformopt.cli.app import app

    command = typer.main.get_command(app)
    try:
        # not command.main(): it would catch an interruption and print errors in its own form
        with command.make_context("xformopt", arguments) as context:
            command.invoke(context)
    except typer.Exit as exit_:
        return exit_.exit_code
    return 0


def _spell_options(arguments: list[str]) -> list[str]:
    """Write option names with dashes, up to a lone ``--``: ``--output_path=x`` is ``--output-path=x``."""
    spelled = list(arguments)
    end = spelled.index("--") if "--" in spelled else len(spelled)
    for index, argument in enumerate(spelled[:end]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            spelled[index] = name.replace("_", "-") + equals + value
    return spelled


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the paragraph for an error, and the exit status."""
    if isinstance(error, XformoptError):
        return _one_line(str(error)), error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was left half-written.", _FAILED
    # what the option parser raises is private to it, but for this method
    if callable(format_message := getattr(error, "format_message", None)):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "xformopt"
        said = _one_line(format_message())
        return f"{said}{'' if said.endswith(('.', '?')) else '.'} See `{command} --help`.", _WRONG_USAGE
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = f" ({error.filename})" if error.filename else ""
        return f"the disk is full{where}, and nothing was left half-written. Free some space, or set TMPDIR.", _FAILED
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return "the machine ran out of memory. Use a smaller --batch or --length, or a machine with more.", _FAILED
    kind, said = type(error).__name__, _one_line(str(error))[:400].rstrip(".")
    return (
        f"an unexpected {kind}: {said or 'no message'}. This is a fault of xformopt or of a library it uses. "
        f"Run the same command with --debug to see where it happened, and report it.",
        _FAILED,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _print_paragraph(text: str) -> None:
    if sys.stderr.isatty():
        width = max(shutil.get_terminal_size().columns - 1, 20)
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Make a request to end (SIGTERM) unwind the stack as Ctrl-C does, so that staged output is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _libraries_silenced(silent: bool) -> Iterator[None]:
    """Keep warnings, log lines and progress bars of libraries off the terminal."""
    import logging
    import warnings

    if not silent:
        yield
        return
    quiet = {
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "critical",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
