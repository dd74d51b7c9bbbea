"""`--verbose`: what the libraries log, how long each part took, and where an error came from; on stderr."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Sequence

import click

import adaptkit
from adaptkit.cli.failure import one_line, say

LOG = logging.getLogger("adaptkit")
FLAGS = ("-v", "--verbose")
HELP = "Also how long each part took, what libraries log, and the traceback of any error."


def is_verbose(words: Sequence[str]) -> bool:
    """Whether the command line asks for it; for what fails before, or after, its options are read."""
    return any(flag in words for flag in FLAGS)


def with_verbose(command: click.Command) -> click.Command:
    """The command with the option. No command has to know of it: Python's logging carries it."""
    option = click.Option(FLAGS, is_flag=True, expose_value=False, is_eager=True, callback=_begin, help=HELP)
    command.params.append(option)
    return command


def _begin(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing or os.environ.get("RANK", "0") != "0":  # of several processes the first
        return
    os.environ.setdefault("HF_HUB_VERBOSITY", "info")  # the hub sets its own level when it is imported
    root, handler = logging.getLogger(), Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    before = root.level, LOG.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    LOG.setLevel(logging.DEBUG)

    def end() -> None:
        root.removeHandler(handler)
        root.setLevel(before[0])
        LOG.setLevel(before[1])

    ctx.call_on_close(end)
    LOG.debug("adaptkit %s, Python %s, %s", adaptkit.__version__, platform.python_version(), platform.platform())


class Stderr(logging.Handler):
    """Lines on what stderr is at that moment: a progress bar puts itself in between while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Text from users and files is made safe, as everywhere."""
        say(one_line(self.format(record)), sys.stderr)
