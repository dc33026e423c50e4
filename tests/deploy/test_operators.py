"""What operators do wrong is said at once and in a sentence or two, and a server waits as long as it takes."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr")

from cryptography import x509

from atoll.core.errors import AtollError, RunError
from atoll.deploy import join as joining
from atoll.deploy.join import Connection, join
from atoll.deploy.keys import check_server_files, make_certificates, make_site_key
from atoll.deploy.link import LinkLost, NodeState
from atoll.deploy.site import read_place
from atoll.deploy.workers import Switchboard


@pytest.fixture
def files(tmp_path: Path) -> Path:
    make_certificates(tmp_path, ["server.example.org"])
    make_site_key(tmp_path / "lyon.key")
    return tmp_path


@pytest.mark.parametrize(
    ("server", "certificate", "key", "said"),
    [
        ("server.example.org", "ca.pem", "lyon.key", "should be HOST:PORT"),
        ("https://server.example.org:9443", "ca.pem", "lyon.key", "should be HOST:PORT"),
        ("s:1", "nothing.pem", "lyon.key", r"There is no file .*nothing.pem \(--certificate\)"),
        ("s:1", "ca.pem", "lyn.key", r"There is no file .*lyn.key \(--key\)"),
        ("s:1", "lyon.key", "ca.pem", "lyon.key is not a certificate"),
        ("s:1", "ca.pem", "lyon.pub", "lyon.pub is not a private key"),
        ("s:1", "ca.pem", "server.key", "server.key is not a private key"),
    ],
)
def test_a_site_hears_of_wrong_files_and_addresses_before_anything_starts(server, certificate, key, said, files):
    connection = Connection(server=server, certificate=files / certificate, key=files / key)
    with pytest.raises(RunError, match=said):
        join(None, connection, files)  # type: ignore[arg-type]


def test_rows_that_are_not_there_are_missed_before_the_site_joins(tmp_path):
    with pytest.raises(AtollError, match=r"There is no file or folder .*patients.csv \(--data\)"):
        read_place(str(tmp_path / "patients.csv"), False)


def test_a_server_hears_of_swapped_files(files):
    check_server_files(files)
    key = (files / "server.key").read_bytes()
    (files / "server.key").write_bytes((files / "server.pem").read_bytes())
    (files / "server.pem").write_bytes(key)
    with pytest.raises(RunError, match="do not belong together"):
        check_server_files(files)


@pytest.mark.parametrize("host", ["https://server.example.org", "server.example.org:9443", "my server"])
def test_a_certificate_is_for_hosts_only(host, tmp_path):
    with pytest.raises(RunError, match="is no host"):
        make_certificates(tmp_path, [host])
    assert not list(tmp_path.iterdir())


def test_a_certificate_names_where_the_server_reaches_itself(files):
    found = x509.load_pem_x509_certificate((files / "server.pem").read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


def test_a_site_says_once_that_the_server_is_away_and_once_that_it_is_back(files, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(joining, "KNOCK", 0.0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
        node = joining._Node(Connection(server=address, certificate=files, key=files), files, said.append)
        node.knock()
        node.knock()
        s.listen()
        node.knock()
        node.knock()
    assert [line.split(" ", 1)[1] for line in said] == [
        f"no server at {address} (Connection refused); trying again", "the server answers",
    ]  # fmt: skip


def test_waiting_for_sites_keeps_the_link_alive_and_mends_it():
    done: list[str] = []

    def nodes() -> dict[int, NodeState]:
        if "mend" not in done:
            raise LinkLost("the SuperLink is gone")
        return {0: NodeState(1, True, "")}

    link = SimpleNamespace(
        beat=lambda: done.append("beat"), mend=lambda: done.append("mend"), nodes=nodes, take=lambda numbers: ()
    )
    board = Switchboard(link, patience=1.0)
    assert board.here() == set()
    assert board.here() == {0}
    assert done == ["beat", "mend", "beat"]
