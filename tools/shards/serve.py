"""`python -m tools.shards serve`: shards over HTTP, as slow and unreliable as you like."""

import argparse
from pathlib import Path
from typing import Any

from tools.support.arguments import natural
from tools.support.range_server import RangeServer

_LAST_PORT = 65535


def add_command(commands: Any, text: str) -> None:
    """Add `serve` to the sub-commands of tools.shards."""
    serve = commands.add_parser("serve", help=text, description=text)
    serve.set_defaults(run=_run)
    serve.add_argument("folder")
    serve.add_argument("--port", type=natural, default=8000, help="(default %(default)s; 0: any)")
    serve.add_argument("--host", default="127.0.0.1", help="(default %(default)s)")
    serve.add_argument("--delay-ms", type=float, default=0.0, help="wait before each answer")
    serve.add_argument(
        "--fail",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of requests that are answered 503, or cut off half-way",
    )
    serve.add_argument("--verbose", action="store_true", help="a line for each request")


def _run(options: argparse.Namespace) -> int:
    if not Path(options.folder).is_dir():
        raise ValueError(f"{options.folder}: is not a folder")
    if options.port > _LAST_PORT:
        raise ValueError(f"--port {options.port}: ports end at {_LAST_PORT}")
    if not (options.delay_ms >= 0 and 0 <= options.fail <= 1):
        raise ValueError(
            f"--delay-ms {options.delay_ms:g} --fail {options.fail:g}: needs a wait from 0 on, and "
            "a share from 0 to 1"
        )
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
