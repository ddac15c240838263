"""Credentials of mirrors: one netrc file, and who is told what of it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fleet.credentials import Login, apt_auth, login_for, read
from fleet.spec import Mirrors
from tests.unit.state import plan_of, service

NETRC = """\
# the site's mirrors
machine mirror.example login fetch password "s3 cret"
machine other.example
    login me
    password pw
default login anyone password none
"""
APT = {"url": "http://mirror.example:8080/debian", "key": "keys/a.asc"}


def test_entries_are_read_as_curl_reads_them() -> None:
    mirror, other, default = read(NETRC)

    assert mirror == Login("mirror.example", "fetch", "s3 cret")
    assert (other.machine, other.login, other.password) == ("other.example", "me", "pw")
    assert default.machine is None
    assert "s3" not in repr(mirror)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("hf_abcdef", "is no netrc file"),
        ("machine a login b", "has no login or no password for a"),
        ('machine a login b password "c', "has a quote that is not closed"),
    ],
)
def test_what_is_no_netrc_file_is_told_without_its_contents(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong) as error:
        read(text)

    assert "hf_" not in str(error.value)


def test_an_address_gets_its_machines_entry() -> None:
    logins = read(NETRC)

    assert login_for(logins, "https://other.example:444/x") == logins[1]
    assert login_for(logins, "https://third.example/x") == logins[2]
    assert login_for(logins[:2], "https://third.example/x") is None


def test_apt_is_told_the_scheme_and_only_its_own_machines() -> None:
    urls = ["http://mirror.example:8080/debian", "http://mirror.example:8080/nvidia"]

    told = apt_auth(read(NETRC.replace('"s3 cret"', "s3"))[:2], urls)

    assert told == "machine http://mirror.example:8080 login fetch password s3\n"


def test_a_host_gets_them_in_files_that_only_root_can_read() -> None:
    plain = plan_of(service(), mirrors={"index": "https://mirror.example/simple"})
    mirrors = Mirrors.model_validate({"apt": {"debian": APT}})
    spec = plain.spec.model_copy(update={"mirrors": mirrors})
    text = "machine mirror.example login fetch password s3"
    plan = replace(plain, spec=spec, credentials=text, keys={"keys/a.asc": "key"})

    secret = [
        file for file in (*plan.system_files, *plan.repository_files("apt")) if "s3" in file.content
    ]

    assert [file.path for file in secret] == [
        "/etc/minimax/fetch/.netrc",
        "/etc/apt/auth.conf.d/minimax.conf",
    ]
    assert {file.mode for file in secret} == {"600"}
    assert "s3" not in repr(plan)
    assert plan.release_request(plan.release)["netrc"] == "/etc/minimax/fetch/.netrc"


def test_without_credentials_the_files_are_empty_so_that_old_ones_go() -> None:
    plan = plan_of(service())

    (file,) = (file for file in plan.system_files if file.path == "/etc/minimax/fetch/.netrc")

    assert (file.content, file.mode) == ("", "600")
    assert plan.release_request(plan.release)["netrc"] is None


# ------------------------------------------------------------------------------------ on the host


@pytest.fixture
def server() -> Iterator[tuple[str, list[str | None]]]:
    """An address that redirects to another name of itself, and the Authorization of each request."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            if moved:
                _, port = listening.server_address[:2]
                self.send_header("Location", f"http://localhost:{port}/here")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", seen
        listening.shutdown()


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / ".netrc"
    file.write_text("machine 127.0.0.1 login fetch password s3\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    return file


def test_a_mirror_is_told_and_not_whom_it_redirects_to(
    program: ModuleType, server: tuple[str, list[str | None]], netrc: Path
) -> None:
    address, seen = server
    basic = "Basic " + base64.b64encode(b"fetch:s3").decode()

    program.open_url(f"{address}/moved").close()

    assert seen == [basic, None]


def test_a_netrc_file_that_cannot_be_read_is_told(program: ModuleType, netrc: Path) -> None:
    netrc.write_text("nonsense")

    with pytest.raises(program.HostError, match="which NETRC names, cannot be read"):
        program.open_url("http://127.0.0.1:1/")


def test_uv_pip_and_git_find_the_file(releases: ModuleType, tmp_path: Path) -> None:
    from tests.unit.test_release_builder import request

    env: dict[str, Any] = releases.uv_environment(
        request(tmp_path, netrc="/etc/minimax/fetch/.netrc")
    )

    assert env["HOME"] == "/etc/minimax/fetch"
    assert "HOME" not in releases.uv_environment(request(tmp_path))
