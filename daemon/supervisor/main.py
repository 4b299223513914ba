# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The program ``hosteld``.

Imports little at the top: the zygote is forked off this process before the rest is loaded, and all
that is here by then is in every worker.

Exit status: 0 stopped in good order (guests run on); 1 failed, the last line of the log says why;
2 the command line or the configuration is wrong, or another hosteld has the state directory. With
--doctor: 0 when VMs can run, 1 when something is missing.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .. import zygote
from . import dirs, log, sdnotify
from .config import LOG_LEVELS, Config, ConfigError, load, read_token

if TYPE_CHECKING:
    from .run import Served

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="hosteld", description="Runs virtual machines and serves their REST API."
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file, see docs/operations.md")
    parser.add_argument("--state-dir", metavar="DIR", help="database, images, disks, console logs")
    parser.add_argument("--runtime-dir", metavar="DIR", help="sockets; belongs to one boot")
    parser.add_argument("--socket", metavar="PATH", help="Unix socket of the API")
    parser.add_argument("--listen", metavar="ADDRESS:PORT", help="loopback TCP, needs --token-file")
    parser.add_argument("--token-file", metavar="FILE", help="file with the bearer token for TCP")
    parser.add_argument("--log-level", choices=LOG_LEVELS)
    parser.add_argument("--doctor", action="store_true", help="say what this host can do, and end")
    parser.add_argument("--json", action="store_true", help="with --doctor: as JSON")
    parser.add_argument("--version", action="store_true")
    args = parser.parse_args(argv)
    if args.json and not args.doctor:
        parser.error("--json goes with --doctor")
    return args


def load_config(args: argparse.Namespace) -> Config:
    """Build the configuration from the file and the command line.

    Raises:
        ConfigError: it cannot be used.
    """
    keys = ("state_dir", "runtime_dir", "socket", "listen", "token_file", "log_level")
    overrides = {key: getattr(args, key) for key in keys}
    for key in ("state_dir", "runtime_dir", "socket", "token_file"):
        if overrides[key] is not None:
            # On the command line a path may be relative to where the operator stands.
            overrides[key] = str(Path(overrides[key]).absolute())
    return load(args.config, overrides, uid=os.geteuid(), environ=os.environ)


def main(argv: Sequence[str] | None = None) -> int:
    """Run hosteld; returns the exit status."""
    args = parse_args(argv)
    if args.version:
        from api.version import hostel_version

        sys.stdout.write(f"hosteld {hostel_version()}\n")
        return EXIT_OK
    try:
        config = load_config(args)
        if args.doctor:
            return _doctor(config, as_json=args.json)
        token = read_token(config.token_file) if config.listen else None
    except ConfigError as err:
        sys.stderr.write(f"hosteld: {err}\n")
        return EXIT_USAGE
    log.setup(config.log_level, is_journal="JOURNAL_STREAM" in os.environ)
    return _run(config, token)


def _doctor(config: Config, *, as_json: bool) -> int:
    from . import doctor

    return doctor.main(
        config.kvm_device, Path(config.state_dir), as_json=as_json, write=sys.stdout.write
    )


def _run(config: Config, token: str | None) -> int:
    _raise_fd_limit()
    os.umask(0o077)
    # From here on a hang-up is no reason to end, and a write to a gone client no signal.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handle = zygote.start()
    except OSError as err:
        logger.critical("no zygote error=%s", err.strerror)
        return EXIT_FAILED
    layout = dirs.Layout(Path(config.state_dir), Path(config.runtime_dir))
    try:
        dirs.prepare(layout)
        locks = [dirs.lock(layout.state), dirs.lock(layout.runtime)]
        dirs.claim_runtime(layout)
    except ConfigError as err:
        logger.critical("%s", err)
        handle.sock.close()
        return EXIT_USAGE
    # All that is heavy is loaded now, beside the zygote's own imports.
    from .run import serve

    served: Served = serve(config, layout, handle, token, sdnotify.listen_fds())
    for fd in locks:
        os.close(fd)
    return EXIT_OK if served.is_clean else EXIT_FAILED


def _raise_fd_limit() -> None:
    """Take as many descriptors as we may: a VM needs about ten while it starts, two afterwards."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
