"""The command line: finds a command in `_COMMANDS`, parses its arguments, carries it out and says what went wrong in one line."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from rich.text import Text

from case_fast import __version__
from case_fast.commands import Command, data, machine, runs, serve
from case_fast.errors import CaseFastError, ConfigError, Interrupted, sentence_of
from case_fast.memory import keep_freed_memory
from case_fast.terminal import Notes, Terminal, lasting_streams, one_line

_COMMANDS: dict[str, Command] = data.COMMANDS | runs.COMMANDS | serve.COMMANDS | machine.COMMANDS


def _overview() -> str:
    rows = "\n".join(f"  {name:<12} {command.what}" for name, command in _COMMANDS.items())
    return f"""case-fast {__version__}: CASE aligns cognition and affection to answer with empathy.

usage: case-fast COMMAND [arguments]          case-fast COMMAND --help

{rows}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 a known error, said in one line, or failed check, 2 usage, 130 interrupted."""
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    # Read when torch loads. Not to be chosen for `bench`, whose peers are measured as people run them.
    if words[:1] != ["bench"] and "OMP_WAIT_POLICY" not in os.environ:
        for variable, value in machine.WAITING.items():
            os.environ.setdefault(variable, value)
    keep_freed_memory()
    with lasting_streams() as output:
        status = _carry_out(words)
    return status or int(output.failed)


def _carry_out(words: list[str]) -> int:
    """Run a command. Every error that is none of the program's own faults is said here, in one line."""
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1 or os.environ.get("RANK", "0") == "0"  # or the first of several
    console, errors = Terminal(quiet=not alone), Terminal(stderr=True)

    def end(status: int, what: str, style: str, said: str = "") -> int:
        errors.say(Text.assemble((what, style), *[f": {one_line(said)}"] * bool(said)))
        return status

    if not words or words[0] in ("--help", "-h", "--version"):
        print(__version__ if words[:1] == ["--version"] else _overview())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Commands: {', '.join(_COMMANDS)}."
        return end(2, "error", "red", f"there is no command {name}. {hint}")
    logging.basicConfig(level=logging.WARNING, handlers=[Notes(errors)])
    logging.getLogger("case_fast").setLevel(logging.INFO if alone else logging.WARNING)
    try:
        _require_a_folder_to_run_in()
        command = _COMMANDS[name]
        return command.run(_parsed(command, name, rest), console) or 0
    except Interrupted as stopped:
        return 130 if stopped.said else end(130, "interrupted", "yellow", str(stopped))
    except KeyboardInterrupt:
        return end(130, "interrupted", "yellow")
    except CaseFastError as error:
        return 1 if error.said else end(1, "error", "red", str(error))
    except OSError as error:
        return end(1, "error", "red", sentence_of(error))
    except MemoryError as error:
        return end(1, "error", "red", f"there is not enough memory ({error})" if str(error) else "there is not enough memory")


def _require_a_folder_to_run_in() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the folder that this command runs in is not there any more; change into another one") from error


def _parsed(command: Command, name: str, words: list[str]) -> Namespace:
    parser = ArgumentParser(prog=f"case-fast {name}", description=command.what)
    if command.left:
        words = command.left(parser, words)
    else:
        command.arguments(parser)
    return parser.instantiate(parser.parse_args(words))


def _underscored(word: str) -> str:
    """--min-count is as good as --min_count."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


if __name__ == "__main__":
    sys.exit(main())
