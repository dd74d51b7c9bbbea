"""The command line: thin commands, the console, exit codes. The only place that prints or exits."""

from __future__ import annotations

from adaptkit.cli.app import main

__all__ = ["main"]
