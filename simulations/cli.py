"""The command ``fedlora``: a thin front end that sorts flags from Hydra overrides and explains errors.

Heavy libraries are imported only by the command that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from simulations.benchmark import options as benchmark

PORT = 9092
JOINING = """\
settings (key=value): where the client's file or machine is different from what the server says:
  data.text=COL  data.text_pair=COL  data.label=COL   columns of the file
  backbone.path=FOLDER                                the frozen model on this machine
  engine.threads=N                                    CPU threads, for several clients on one machine"""

DESCRIPTION = """\
Federated LoRA fine-tuning: simulate, compare, then deploy the same configuration.

  fedlora simulate experiment=demo              seven methods on real data, one table
  fedlora simulate method=fed_sb rounds=20      one run; every setting is group=option or key=value
  fedlora simulate experiment=smollm2_instruct  a language model on two cores
  fedlora simulate -m method=fedit,ffa seed=1,2 a sweep over all combinations
  fedlora plan --compare                        bytes, parameters and memory before anything runs
  fedlora methods                               what method=... can be
  fedlora resume runs/2026-01-31_12-00-00       finish a run that was interrupted
  fedlora forget "site 3" runs/2026-01-31_12-00-00   take a client out of a finished run
  fedlora serve method=fed_sb data.labels=[no,yes] --certs certs/   the same configuration with real clients
  fedlora join fl.example.org:9092 --data rows.csv --ca ca.crt --key site-a   one of them
  fedlora certs server certs --host fl.example.org   a server's certificate; 'certs client site-a': a client's key
  fedlora report runs/2026-01-31_12-00-00 -o report.html   one page of figures and a table, to open offline
  fedlora bench --only small --scale 0.25       how fast it is on this machine, and against what"""

SETTINGS = """\
settings (key=value, as in conf/config.yaml):
  method=fedit|ffa|fedex|fed_sb|flora|flexlora|local|central|zero_shot   sets adapter, strategy and client.lr
  data=rotten_tomatoes|csv|jsonl|parquet|hf|imagefolder  data.path=FILE  data.text=COL  data.label=COL  data.client=COL
  data=sst2|mnli|stsb|gsm8k|dolly|alpaca_gpt4|medqa|...      presets: columns, template, task and metric of a data set
  task=classification|regression|causal_lm|generation|multiple_choice|...   or task.name=./mine.py:Mine
  partition=natural|iid|dirichlet|pathological|...           who owns which row
  backbone=minilm|smollm2|hf  backbone.path=FOLDER           the frozen model
  adapter.rank=8  adapter.target_modules=attention|all-linear|[query,value]  adapter.head=shared|private|frozen
  adapter=peft adapter.config._target_=peft.MissConfig       any adapter of PEFT
  strategy._target_=./mine.py:Mine                           a strategy of your own, or any of Flower's
  engine=auto|cohort|loop|flower  engine.workers=2  precision=fp32|bf16|auto   what trains, and in which number format
  rounds=10  cohort.size=12  client.lr=2e-3  client.local_epochs=1  seed=1  run_dir=runs/mine"""


SPLITS = ("seen", "test", "validation")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 ok, 1 the run failed, 2 bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags, overrides = sort_arguments(arguments)
    parser = _parser()
    options = parser.parse_args(flags)
    if options.command is None:
        parser.print_help()
        return 2
    if options.command in ("methods", "resume", "forget", "certs", "audit", "bench") and overrides:
        parser.error(f"'{options.command}' takes no settings, got {overrides[0]!r}")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    working_directory = os.getcwd()
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    from simulations import commands

    return commands.run(options, overrides)


def sort_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into flags and words for argparse, and Hydra overrides (anything with ``=``, and ``~group``)."""
    if arguments[:1] in (["forget"], ["report"]):  # ids of clients and names of files are any text
        return list(arguments), []
    overrides = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    return [a for a in arguments if a not in overrides], overrides


def deployment(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands of a deployment."""
    serve = command("serve", "the server side of a run with real clients", SETTINGS)
    safety = serve.add_mutually_exclusive_group(required=True)
    safety.add_argument("--certs", metavar="FOLDER", help="ca.crt, server.pem, server.key and clients/<id>.pub")
    safety.add_argument("--insecure", action="store_true", help="no encryption, and clients are who they say they are")
    serve.add_argument("--clients", default="", metavar="A,B", help="with --insecure: the ids of the clients")
    serve.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")
    serve.add_argument("--port", type=int, default=PORT, help=f"port to listen on (default {PORT})")
    serve.add_argument("--wait-for", type=int, metavar="N", help="clients to wait for at the start (default: all)")
    serve.add_argument("--merged", action="store_true", help="also write the whole model with the adapter merged in")
    join = command("join", "one real client with rows of its own", JOINING)
    join.add_argument(
        "server", metavar="SERVER", nargs="?", help=f"host or host:port of the server (default port {PORT})"
    )
    join.add_argument("--data", required=True, metavar="FILE", help="the client's rows: .csv, .jsonl or .parquet")
    join.add_argument(
        "--check", action="store_true",
        help="without any network: do the rows suit a run with these settings, which are those of 'fedlora serve'?",
    )  # fmt: skip
    join.add_argument("--ca", metavar="FILE", help="certificate that the server's is checked with")
    join.add_argument("--key", metavar="FILE", help="the client's private key; its name is the client's id")
    join.add_argument("--insecure", action="store_true", help="no encryption, no key: for a test on one machine")
    join.add_argument("--id", metavar="NAME", help="with --insecure: the client's id")
    join.add_argument("--policy", metavar="FILE", help="what this client allows, as YAML; no server overrides it")
    join.add_argument("--home", metavar="FOLDER", help="what the client keeps (default client-<id>)")


def certificates(certs: argparse.ArgumentParser) -> None:
    """The two kinds of ``fedlora certs``."""
    kinds = certs.add_subparsers(dest="kind", metavar="server|client", required=True)
    server = kinds.add_parser("server", help="certificate of a server, and the authority that clients check it with")
    server.add_argument("folder", metavar="FOLDER", help="where to; an authority in it is used again")
    server.add_argument("--host", required=True, metavar="HOST,HOST", help="names and addresses of the server")
    server.add_argument("--days", type=int, default=365, help="how long the certificate lasts (default 365)")
    client = kinds.add_parser("client", help="private and public key of a client")
    client.add_argument("name", metavar="NAME", help="the client's id")
    client.add_argument("--folder", default=".", metavar="FOLDER", help="where to (default: here)")


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fedlora", description=DESCRIPTION, epilog=SETTINGS, formatter_class=layout)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=layout)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return sub

    simulate = command("simulate", "run a federation on this machine, or a sweep of them with -m", SETTINGS)
    simulate.add_argument("-m", "--multirun", action="store_true", help="sweep over comma-separated values")
    simulate.add_argument("--merged", action="store_true", help="also write the whole model with the adapter merged in")
    plan = command("plan", "what a run will send, hold and compute, without running it", SETTINGS)
    plan.add_argument("--compare", action="store_true", help="one row for every method")
    plan.add_argument("--json", action="store_true", help="print one JSON document")
    plan.add_argument("--bandwidth", type=float, default=10.0, metavar="MBIT", help="link speed in Mbit/s (default 10)")
    methods = command("methods", "list the methods: adapter, strategy, exactness, learning rate")
    methods.add_argument("--json", action="store_true", help="print one JSON document")
    resume = command("resume", "finish an interrupted run with the same bits")
    resume.add_argument("run", metavar="RUN", help="the run folder")
    resume.add_argument("--merged", action="store_true", help="also write the whole model with the adapter merged in")
    forget = command(
        "forget",
        "take a client out of a finished run, and say what that is: exact unlearning, block removal, suppression",
    )
    forget.add_argument(
        "client", metavar="CLIENT", help="the client's id as in the ledger, or with adapter.groups the name of a group"
    )
    forget.add_argument("run", metavar="RUN", help="the run folder")
    split = command("split", "write what each client of a simulation owns to a file of its own", SETTINGS)
    split.add_argument("folder", metavar="FOLDER", help="a new folder")
    deployment(command)
    certificates(command("certs", "certificates of a server, or the key of a client, for a run with real clients"))
    audit = command("audit", "see whether a client's audit log is as it was written")
    audit.add_argument("log", metavar="LOG", help="audit.jsonl, or the client's folder that it lies in")
    report = command("report", "one page of figures and a table from finished runs, that opens offline")
    report.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, folders of sweeps, patterns")
    report.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the page (default report.html)")
    report.add_argument(
        "--table", action="append", default=[], metavar="FILE", help="the table, too: .csv, .md or .tex"
    )
    report.add_argument("--figures", metavar="FOLDER", help="every figure as a file, too; a Chromium draws them")
    report.add_argument("--format", choices=("svg", "png"), default="svg", help="of --figures (default svg)")
    report.add_argument("--on", choices=SPLITS, help="the rows scores are taken on (default: the first all runs have)")
    benchmark.add_arguments(command("bench", benchmark.DESCRIPTION, benchmark.EPILOG))
    return parser


if __name__ == "__main__":
    sys.exit(main())
