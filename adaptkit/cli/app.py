"""The group of commands, and the one place where an exception becomes a message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

import adaptkit
from adaptkit.cli.command_adapt import adapt_command
from adaptkit.cli.command_backbones import backbones_command
from adaptkit.cli.command_check import check_command
from adaptkit.cli.command_codes import codes_command
from adaptkit.cli.command_demo import demo_command
from adaptkit.cli.command_embed import embed_command
from adaptkit.cli.command_export import export_command
from adaptkit.cli.command_probe import probe_command
from adaptkit.cli.command_recipes import recipes_command
from adaptkit.cli.command_report import report_command
from adaptkit.cli.command_resume import resume_command
from adaptkit.cli.completion import with_completions
from adaptkit.cli.failure import describe, heed_signals, ignore_signals, report_failure, say_traceback
from adaptkit.cli.launch import is_launched
from adaptkit.cli.verbose import is_verbose, with_verbose
from adaptkit.errors import AdaptkitError, did_you_mean
from adaptkit.signals import stop_without_parent


class App(click.Group):
    """A group that suggests commands and turns every exception into one line and its exit code."""

    def __call__(self, *args: Any, **extra: Any) -> Any:
        """What the command `adaptkit` calls: the process is ours, and with it its signals."""
        heed_signals()
        if is_launched():
            stop_without_parent()
        return super().__call__(*args, **extra)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a suggestion for a misspelt command."""
        names = self.list_commands(ctx)
        if args[0] in names or args[0].startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        hint = did_you_mean(args[0], names)
        raise click.UsageError(f"no such command {args[0]!r}{hint or '; commands: ' + ', '.join(names)}", ctx)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and leave the process with its exit code (with `standalone_mode=False`: return it)."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, AdaptkitError) and is_verbose(words):
                say_traceback(error)
            code = report_failure(error, describe(error), as_json="--json" in words)
        if standalone_mode:
            ignore_signals()
            sys.exit(code)
        return code


@click.group(
    cls=App,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 a bug, 2 usage or recipe, 3 data, 4 backbone or weights, 5 --require-gain not met, "
    "6 collapsed, 7 GPU out of memory, 8 disk full or no permission, 75 interrupted (go on with `adaptkit resume`).\n\n"
    'Completion, for bash: eval "$(_ADAPTKIT_COMPLETE=bash_source adaptkit)"; zsh_source and fish_source for those.',
)
@click.version_option(adaptkit.__version__, prog_name="adaptkit")
def main() -> None:
    """Adapt a pretrained backbone to your own unlabelled images, and prove that it got better.

    \b
      adaptkit adapt --backbone dino_vits16 --data ./images
      adaptkit probe --backbone dino_vits16 --data ./labelled
    """


for command in (
    demo_command,
    check_command,
    adapt_command,
    resume_command,
    report_command,
    probe_command,
    embed_command,
    codes_command,
    export_command,
    backbones_command,
    recipes_command,
):
    main.add_command(with_completions(with_verbose(command)))
