"""`python -m tools.shards serve`: shards over HTTP, as slow and unreliable as you like."""

import argparse
import math
import os
from typing import Any

from tools.serve import RangeServer


def add_command(commands: Any, text: str) -> None:
    """Add `serve` to the sub-commands of tools.shards."""
    serve = commands.add_parser("serve", help=text, description=text)
    serve.set_defaults(run=_run)
    serve.add_argument("folder")
    serve.add_argument("--port", type=_port, default=8000, help="(default %(default)s; 0: any)")
    serve.add_argument("--host", default="127.0.0.1", help="(default %(default)s)")
    serve.add_argument(
        "--delay-ms", type=_milliseconds, default=0.0, help="wait before each answer"
    )
    serve.add_argument(
        "--fail",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of requests that are answered 503, or cut off half-way",
    )
    serve.add_argument("--verbose", action="store_true", help="a line for each request")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def _milliseconds(text: str) -> float:
    if not 0.0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds from 0 on")
    return value


def _share(text: str) -> float:
    if not 0.0 <= (value := float(text)) <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return value


def _run(options: argparse.Namespace) -> int:
    if not os.path.isdir(options.folder):
        raise NotADirectoryError(f"{options.folder}: is no folder")
    server = RangeServer(
        options.folder,
        options.port,
        options.host,
        delay_s=options.delay_ms / 1000,
        fail_fraction=options.fail,
        verbose=options.verbose,
    )
    print(f"serving {server.folder} at {server.url} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0
