"""``fedlora certs``: makes certificates and keys, and says who gets which file."""

from __future__ import annotations

from pathlib import Path

from fedlora.deploy import keys

SERVER = """\
{folder}: a certificate for {hosts}, valid for {days} days.

  ca.crt      give it to every client ('fedlora join --ca ca.crt')
  ca.key      secret, signs new certificates: serving does not need it, keep it offline
  server.pem  stays here
  server.key  secret, stays here
  clients/    put the public key of every client into it: clients/site-a.pub

SHA-256 of ca.crt, to compare with clients by telephone:
{fingerprint}"""
CLIENT = """\
{path}: the key of client '{name}'.

  {name}      secret, stays on this machine ('fedlora join --key {path}')
  {name}.pub  send it to the server, for its folder clients/

Fingerprint, to compare with the server by telephone ('ssh-keygen -l -f {name}.pub' shows it there):
{fingerprint}"""


def server(folder: Path, hosts: str, days: int) -> str:
    """Make a server's certificate for ``hosts`` (``a,b``); returns what to do next.

    Raises:
        InputError: nothing was made.
    """
    named = [host.strip() for host in hosts.split(",")]
    keys.make_server_certificates(folder, named, days)
    (folder / "clients").mkdir(exist_ok=True)
    said = keys.certificate_fingerprint(folder / keys.AUTHORITY)
    return SERVER.format(folder=folder, hosts=", ".join(named), days=days, fingerprint=said)


def client(folder: Path, name: str) -> str:
    """Make the key of client ``name``; returns what to do next.

    Raises:
        InputError: nothing was made.
    """
    path = folder / name
    said = keys.make_client_key(path)
    return CLIENT.format(path=path, name=path.name, fingerprint=said)
