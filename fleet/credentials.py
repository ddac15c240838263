"""Credentials of the site's mirrors: a netrc file, and what apt and dnf make of it. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Login:
    """What to say to one machine; `machine` is None for the entry called default."""

    machine: str | None
    login: str
    password: str = field(repr=False)


def read(text: str) -> tuple[Login, ...]:
    """The entries of a netrc file. Raises ValueError, without a word of its contents."""
    try:
        words = iter(shlex.split(text, comments=True))
    except ValueError as error:
        raise ValueError("has a quote that is not closed") from error
    entries: list[dict[str, str | None]] = []
    for word in words:
        if word == "machine":
            entries.append({"machine": next(words, None)})
        elif word == "default":
            entries.append({"machine": None})
        elif word in ("login", "password", "account") and entries:
            entries[-1][word] = next(words, None)
        else:
            raise ValueError("is no netrc file; write: machine HOST login NAME password SECRET")
    logins = []
    for entry in entries:
        login, password = entry.get("login"), entry.get("password")
        if not login or not password:
            raise ValueError(f"has no login or no password for {entry['machine'] or 'default'}")
        logins.append(Login(entry["machine"], login, password))
    return tuple(logins)


def login_for(logins: Iterable[Login], url: str) -> Login | None:
    """The entry for an address: the machine's own, else the default."""
    machine = urlsplit(url).hostname
    return next((login for login in logins if login.machine in (machine, None)), None)


def apt_auth(logins: Iterable[Login], urls: Iterable[str]) -> str:
    """apt's own form, for its addresses; where a scheme is http apt wants it named (apt_auth.conf(5))."""
    logins = tuple(logins)
    lines = {}
    for url in urls:
        login = login_for(logins, url)
        if login is not None:
            parts = urlsplit(url)
            place = f"{parts.scheme}://{parts.netloc}"
            lines[place] = f"machine {place} login {login.login} password {login.password}\n"
    return "".join(lines.values())
