"""What a report says of its user: the home folder, the user's and the machine's name, which `--json` leaves out."""

from __future__ import annotations

import getpass
import os
import platform
import pwd
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from case_fast.doctor.check import Check, Finding, Look, fail, ok, warn

_QUOTING = ("path", "reason", "remedy")  # what of a check is not the same on every machine


def redacted(check: Check) -> Check:
    """The check without what tells who its user is, in whatever it quotes."""
    return replace(check, **{name: _without(getattr(check, name)) for name in _QUOTING})


def looks(checks: Sequence[Check], full: bool) -> Iterator[Look]:
    yield Look("--json", lambda: _json(checks, full), "case-fast doctor --json | less")


def _json(checks: Sequence[Check], full: bool) -> Finding:
    if full:
        found = _told(checks)
        if found:
            return warn(f"tells {' and '.join(found)}, since --full asks for it", "case-fast doctor --json")
    elif found := _told([redacted(check) for check in checks]):
        return fail(f"tells {' and '.join(found)}", "case-fast doctor --json | less")
    return ok("tells no home folder, user or host" + ("" if full else "; --full does"))


def _told(checks: Sequence[Check]) -> list[str]:
    """What of `_private` a report would tell."""
    text = "\n".join(getattr(check, name) for check in checks for name in _QUOTING)
    return sorted({what for what, pattern, _ in _private() if pattern.search(text)})


def _without(text: str) -> str:
    for _, pattern, instead in _private():
        text = pattern.sub(instead, text)
    return text


def _private() -> list[tuple[str, re.Pattern[str], str]]:
    """(what it is, how it is found, what stands in its place): home folders first, since they hold the user's name."""
    homes = {os.environ.get("HOME", ""), _known(lambda: pwd.getpwuid(os.getuid()).pw_dir)}
    homes |= {os.path.realpath(home) for home in homes if home}
    users = {_known(getpass.getuser), _known(lambda: pwd.getpwuid(os.getuid()).pw_name)}
    hosts = {_known(socket.gethostname), _known(platform.node)}
    hosts |= {host.partition(".")[0] for host in hosts}
    kinds = (("a home folder", homes - {"", "/"}, "~"), ("a user", users - {""}, "USER"),
             ("a host", hosts - {"", "localhost"}, "HOST"))
    return [(what, re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"), instead)
            for what, names, instead in kinds for name in sorted(names, key=len, reverse=True)]


def _known(ask: Callable[[], str]) -> str:
    """"" where the system does not know."""
    try:
        return ask()
    except (OSError, KeyError):
        return ""
