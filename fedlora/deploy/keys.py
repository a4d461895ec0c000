"""Certificates of a server and keys of clients, in the formats that Flower reads.

A server proves who it is with a certificate of an authority of its own, which clients are given; a client proves who
it is with a private key, whose public half the server is given. Private files can be read by their owner only.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import InputError

AUTHORITY_DAYS = 3650
"""How long the authority lasts: its certificate is what clients are given, and is not replaced with the server's."""
AUTHORITY, AUTHORITY_KEY = "ca.crt", "ca.key"
CERTIFICATE, CERTIFICATE_KEY = "server.pem", "server.key"
THIS_MACHINE = ("localhost", "127.0.0.1")
"""Hosts that every certificate is for: a server's own parts talk to each other, too."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def make_server_certificates(folder: Path, hosts: Sequence[str], days: int = 365) -> None:
    """Write a server's certificate and key into ``folder``, and the authority that signs it where there is none yet.

    Files: ``ca.crt`` for every client; ``ca.key``, which signs new certificates and is not needed to serve;
    ``server.pem`` and ``server.key``. An authority that is there is used again, so that clients keep their ``ca.crt``
    when the server's certificate is renewed.

    Args:
        folder: made if it is not there.
        hosts: names and addresses that clients reach the server by.
        days: how long the server's certificate lasts.

    Raises:
        InputError: a host is none, there is a certificate already, or half an authority.
    """
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *THIS_MACHINE))]
    if not hosts:
        raise InputError("Name the hosts that clients reach the server by, such as fl.example.org or 10.0.0.5.")
    if days < 1:
        raise InputError(f"A certificate cannot last {days} days. Give 1 or more.")
    folder.mkdir(parents=True, exist_ok=True)
    _require_free(folder / CERTIFICATE, "To renew it, move it and its key away first; the authority stays.")
    _require_free(folder / CERTIFICATE_KEY, "To renew it, move it and its certificate away first.")
    authority, authority_key = _authority(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    now = _now()
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    certificate = (
        _builder(hosts[0], key.public_key(), authority.subject, now, min(now + _days(days), _end_of(authority)))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_issued_by(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    _write_new(folder / CERTIFICATE_KEY, _pem(key), 0o600)
    _write_new(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def make_client_key(path: Path) -> str:
    """Write a new private key (EC P-384, OpenSSH format) to ``path`` and its public half to ``path``.pub.

    Returns:
        The fingerprint.

    Raises:
        InputError: the name cannot be a client's id, or there is a file already.
    """
    if not NAME.fullmatch(path.name):
        raise InputError(
            f"'{path.name}' cannot be the name of a client's key: it is the client's id, too. Use letters, digits, "
            "'-' and '_', such as site-a."
        )
    public_path = path.with_name(f"{path.name}.pub")
    for each in (path, public_path):
        _require_free(each, "A key is never overwritten; choose another name, or move it away.")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = _openssh(key.public_key())
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_new(path, private, 0o600)
    _write_new(public_path, public + f" {path.name}\n".encode(), 0o644)
    return fingerprint(public)


def public_key_of(path: Path) -> bytes:
    """The public half, one line of OpenSSH's format, of the private key in ``path``.

    Raises:
        InputError: there is no such file, others can read it, or it is no key that Flower takes.
    """
    if not path.is_file():
        raise InputError(f"There is no private key {path}. 'fedlora certs client NAME' makes one.")
    if path.stat().st_mode & 0o077:
        raise InputError(f"{path} can be read by others, and is no secret any more: chmod 600 {path}.")
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(
            f"{path} is no private key in OpenSSH format without a password. 'fedlora certs client NAME' makes one."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path} is a key of another kind than EC. 'fedlora certs client NAME' makes one.")
    return _openssh(key.public_key())


def registered_key(path: Path) -> bytes:
    """The key in ``path``, a file of OpenSSH's format such as ``site-a.pub``, as Flower's SuperLink keeps it (PEM).

    Raises:
        InputError: it is no key that Flower takes.
    """
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(f"{path} is no public EC key in OpenSSH format. 'fedlora certs client NAME' makes NAME.pub.")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(public: bytes) -> str:
    """``SHA256:...`` of a public key in OpenSSH's format, as ``ssh-keygen -l`` shows it, to compare by telephone.

    Raises:
        InputError: it is no such key.
    """
    try:
        kind, encoded = public.split()[:2]
        serialization.load_ssh_public_key(kind + b" " + encoded)
        content = base64.b64decode(encoded)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError("This is no public key in OpenSSH format, such as the file NAME.pub has.") from None
    return "SHA256:" + base64.b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def certificate_fingerprint(path: Path) -> str:
    """SHA-256 of the certificate in ``path``, as ``openssl x509 -fingerprint -sha256`` shows it.

    Raises:
        InputError: there is no certificate in it.
    """
    return _certificate(path).fingerprint(hashes.SHA256()).hex(":").upper()


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority in ``folder``, which is made where there is none."""
    paths = folder / AUTHORITY, folder / AUTHORITY_KEY
    there = [path for path in paths if path.exists()]
    if len(there) == 1:
        missing = next(path for path in paths if path not in there)
        raise InputError(f"There is {there[0]} without {missing.name}: put {missing.name} beside it, or move it away.")
    if there:
        key = serialization.load_pem_private_key(paths[1].read_bytes(), password=None)
        authority = _certificate(paths[0])
        if not isinstance(key, ec.EllipticCurvePrivateKey) or authority.public_key() != key.public_key():
            raise InputError(f"{paths[1]} is not the key of {paths[0]}: move both away for a new authority.")
        return authority, key
    key = ec.generate_private_key(ec.SECP384R1())
    now, own_name = _now(), "fedlora authority"
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    authority = (
        _builder(own_name, key.public_key(), _name(own_name), now, now + _days(AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write_new(paths[1], _pem(key), 0o600)
    _write_new(paths[0], authority.public_bytes(serialization.Encoding.PEM), 0o644)
    return authority, key


def _builder(
    subject: str, key: ec.EllipticCurvePublicKey, issuer: x509.Name, begin: datetime.datetime, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(host: str) -> x509.GeneralName:
    """A name or an address of a host."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    label = r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
    if not re.fullmatch(rf"(\*\.)?{label}(\.{label})*", host):
        raise InputError(f"'{host}' is neither the name nor the address of a host, such as fl.example.org or 10.0.0.5.")
    return x509.DNSName(host)


def _issued_by(key: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise InputError(f"{path} is no certificate. 'fedlora certs server FOLDER --host HOST' makes one.") from None


def _end_of(certificate: x509.Certificate) -> datetime.datetime:
    return certificate.not_valid_after_utc


def _now() -> datetime.datetime:
    """A little before now, for clocks that are behind."""
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)


def _days(days: int) -> datetime.timedelta:
    return datetime.timedelta(days=days)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _openssh(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _require_free(path: Path, fix: str) -> None:
    if path.exists():
        raise InputError(f"{path} is there already. {fix}")


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that nobody has written before, readable as ``mode`` says from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
