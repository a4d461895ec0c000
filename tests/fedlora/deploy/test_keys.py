"""Certificates and keys: who they let in, who they do not, and what is never overwritten."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from fedlora.deploy.keys import (
    certificate_fingerprint,
    fingerprint,
    make_client_key,
    make_server_certificates,
    public_key_of,
    registered_key,
)
from fedlora.errors import InputError

HOSTS = ("fl.example.org", "10.0.0.5", "::1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_server_certificates(folder, HOSTS)
    return folder


def shake_hands(server: Path, authority: Path, host: str) -> None:
    """A TLS handshake on this machine, of a server with the files in ``server`` and a client that asks for ``host``."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(server / "server.pem", server / "server.key")
    theirs = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                try:
                    ours.wrap_socket(connection, server_side=True).close()
                except (ssl.SSLError, OSError):
                    return  # what matters is what the client says

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname()) as plain,
                theirs.wrap_socket(plain, server_hostname=host) as secure,
            ):
                assert secure.version() == "TLSv1.3"
        finally:
            thread.join()


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1"])
def test_a_client_with_the_authority_trusts_every_host_of_the_certificate(folder: Path, host: str) -> None:
    shake_hands(folder, folder, host)


@pytest.mark.parametrize("host", ["other.example.org", "10.0.0.6"])
def test_no_other_host_is_trusted(folder: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(Hostname|IP address) mismatch"):
        shake_hands(folder, folder, host)


def test_no_other_authority_is_trusted(folder: Path, tmp_path: Path) -> None:
    make_server_certificates(tmp_path, HOSTS)
    with pytest.raises(ssl.SSLCertVerificationError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(tmp_path, folder, HOSTS[0])


def test_a_renewed_certificate_is_trusted_by_clients_of_the_same_authority(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    with pytest.raises(InputError, match=r"server\.pem is there already.*the authority stays"):
        make_server_certificates(tmp_path, ["new.example.org"])
    for name in ("server.pem", "server.key"):
        (tmp_path / name).unlink()
    make_server_certificates(tmp_path, ["new.example.org"])
    shake_hands(tmp_path, folder, "new.example.org")
    assert certificate_fingerprint(tmp_path / "ca.crt") == certificate_fingerprint(folder / "ca.crt")


def test_half_an_authority_and_another_key_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "ca.crt", tmp_path)
    with pytest.raises(InputError, match=r"without ca\.key"):
        make_server_certificates(tmp_path, HOSTS)
    shutil.copy(folder / "server.key", tmp_path / "ca.key")
    with pytest.raises(InputError, match="is not the key of"):
        make_server_certificates(tmp_path, HOSTS)


@pytest.mark.parametrize("host", ["", "http://fl.example.org", "fl.example.org:9092", "10.0.0.5/24", "a b"])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="neither the name nor the address"):
        make_server_certificates(tmp_path, [host])
    assert list(tmp_path.iterdir()) == []


def test_private_files_can_be_read_by_their_owner_only(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_client_key(tmp_path / "site-a")
        make_server_certificates(tmp_path, HOSTS)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    private, public = {"site-a", "ca.key", "server.key"}, {"site-a.pub", "ca.crt", "server.pem"}
    assert modes == dict.fromkeys(private, 0o600) | dict.fromkeys(public, 0o644)


def test_a_client_key_is_what_flower_takes(tmp_path: Path) -> None:
    said = make_client_key(tmp_path / "site-a")
    private = serialization.load_ssh_private_key((tmp_path / "site-a").read_bytes(), None)
    public = serialization.load_ssh_public_key((tmp_path / "site-a.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert private.public_key() == public
    assert uses_nist_ec_curve(public)
    assert registered_key(tmp_path / "site-a.pub") == public_key_to_bytes(public)
    assert (tmp_path / "site-a.pub").read_bytes().startswith(public_key_of(tmp_path / "site-a"))
    assert (
        said == fingerprint(public_key_of(tmp_path / "site-a")) == fingerprint((tmp_path / "site-a.pub").read_bytes())
    )


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")
def test_the_fingerprint_is_that_of_ssh_keygen(tmp_path: Path) -> None:
    said = make_client_key(tmp_path / "site-a")
    listed = subprocess.run(["ssh-keygen", "-lf", tmp_path / "site-a.pub"], check=True, capture_output=True, text=True)
    assert listed.stdout.split()[:2] == ["384", said]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    make_client_key(tmp_path / "site-a")
    before = (tmp_path / "site-a").read_bytes()
    with pytest.raises(InputError, match=r"site-a is there already\. A key is never overwritten"):
        make_client_key(tmp_path / "site-a")
    (tmp_path / "site-b.pub").write_text("somebody's")
    with pytest.raises(InputError, match=r"site-b\.pub is there already"):
        make_client_key(tmp_path / "site-b")
    assert (tmp_path / "site-a").read_bytes() == before
    assert not (tmp_path / "site-b").exists()


@pytest.mark.parametrize("name", ["site.a", "site a", "-site", "..", "sité"])
def test_a_name_that_cannot_be_an_id_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name"):
        make_client_key(tmp_path / name)


def test_a_key_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no private key"):
        public_key_of(tmp_path / "site-a")
    make_client_key(tmp_path / "site-a")
    (tmp_path / "site-a").chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        public_key_of(tmp_path / "site-a")
    (tmp_path / "site-a").chmod(0o600)
    (tmp_path / "site-a").write_text("nothing")
    with pytest.raises(InputError, match="no private key in OpenSSH format"):
        public_key_of(tmp_path / "site-a")
    other = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (tmp_path / "site-a").write_bytes(other)
    with pytest.raises(InputError, match="another kind than EC"):
        public_key_of(tmp_path / "site-a")
    with pytest.raises(InputError, match="no public EC key"):
        registered_key(tmp_path / "site-a")
    with pytest.raises(InputError, match="no public key"):
        fingerprint(b"ssh-rsa nothing")
