"""From the command line to a deployment: what ``fedlora serve`` and ``fedlora join`` are given, checked."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora.config import Config, nearest
from fedlora.deploy.code import what_runs
from fedlora.deploy.keys import public_key_of
from fedlora.deploy.policy import Policy
from fedlora.deploy.runtime import quiet_flower
from fedlora.errors import InputError
from simulations.cli import PORT
from simulations.messages import say

log = logging.getLogger("fedlora")
OWN_SETTINGS = (
    "data.text", "data.text_pair", "data.label", "data.messages", "data.choices", "backbone.path", "engine.threads",
)  # fmt: skip
SERVER_FILES = ("ca.crt", "server.pem", "server.key")


def serve(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Serve ``config`` as the options say; returns the summary.

    Raises:
        InputError: an option or a file is missing.
    """
    quiet_flower()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by its id as by Ctrl-C
    from simulations.deploy.serve import Serving
    from simulations.deploy.serve import serve as serve_run

    named = tuple(sorted(filter(None, options.clients.split(","))))
    if options.insecure:
        if not named:
            raise InputError("--insecure has no keys to know the clients by: name them, --clients site-a,site-b.")
        say("warning", "no encryption, and clients are who they say they are (--insecure)", "bold red")
        serving = Serving(options.host, options.port, None, named, options.wait_for)
    else:
        folder = Path(options.certs)
        for name in SERVER_FILES:
            if not (folder / name).is_file():
                raise InputError(f"--certs {folder}: there is no {name}. 'fedlora certs server' makes one.")
        known = tuple(sorted(path.stem for path in (folder / "clients").glob("*.pub")))
        if foreign := sorted(set(named) - set(known)):
            raise InputError(f"--clients {foreign[0]}: there is no key {folder}/clients/{foreign[0]}.pub.")
        serving = Serving(options.host, options.port, folder, named or known, options.wait_for)
    return serve_run(config, Path(config.run_dir), serving, merged=options.merged)


def check(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print what a run with these settings would find and need here; returns 2 if it cannot be joined so.

    Raises:
        InputError: the settings or the rows cannot work.
    """
    from simulations.compose import compose_config
    from simulations.deploy.check import check as check_rows
    from simulations.deploy.check import described

    if not Path(options.data).exists():
        raise InputError(f"--data {options.data} does not exist.")
    policy = Policy.read(Path(options.policy)) if options.policy else Policy()
    findings = check_rows(compose_config(overrides), options.data, policy)
    print(described(findings))
    return 0 if all(finding.fits for finding in findings) else 2


def join(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Join a server as the options say, until interrupted.

    Raises:
        InputError: an option or a file is missing.
        FedloraError: the server does not let this client in.
    """
    quiet_flower()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by its id as by Ctrl-C
    from fedlora.deploy.client import Home
    from fedlora.deploy.join import join as join_server

    if options.server is None:
        raise InputError("Name the server, such as fl.example.org:9092; or --check, which needs none.")
    if options.insecure and (options.ca or options.key):
        raise InputError("--insecure uses neither --ca nor --key: leave it out, or them.")
    if options.insecure and not options.id:
        raise InputError("--insecure has no key to take the client's id from: name it, --id site-a.")
    if not options.insecure and not (options.ca and options.key):
        raise InputError("Give --ca (the server's certificate authority) and --key (this client's private key).")
    for name in ("data", "ca", "key"):
        path = getattr(options, name)
        if path is not None and not Path(path).exists():
            raise InputError(f"--{name} {path} does not exist.")
    settings = {name: value for name, _, value in (override.partition("=") for override in overrides)}
    for name in settings:
        if name not in OWN_SETTINGS:
            raise InputError(
                f"'{name}' is the server's to set.{nearest(name, OWN_SETTINGS)} A client has: "
                f"{', '.join(OWN_SETTINGS)}."
            )
    if options.key:
        public_key_of(Path(options.key))
    client = options.id or Path(options.key).stem
    columns: dict[str, str | None] = {
        name.removeprefix("data."): value for name, value in settings.items() if name.startswith("data.")
    }
    folder = Path(options.home or f"client-{client}")
    threads = settings.get("engine.threads")
    if threads is not None:
        if not threads.isdecimal() or not int(threads):
            raise InputError(f"engine.threads = {threads!r} is no number of CPU threads: set 1 or more.")
        torch.set_num_threads(int(threads))
    policy = Policy.read(Path(options.policy)) if options.policy else Policy()
    home = Home(folder, client, str(Path(options.data).resolve()), columns, settings.get("backbone.path"), policy)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    server = options.server if ":" in options.server else f"{options.server}:{PORT}"
    say("code", what_runs())
    say("joining", f"{server} as '{client}'; stop with Ctrl-C", "bold")
    ca, key = options.ca and Path(options.ca), options.key and Path(options.key)
    join_server(server, home, ca, key, lambda text: say("note", text))
