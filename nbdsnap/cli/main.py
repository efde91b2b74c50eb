"""The command ``nbdsnap``: its group of commands, and the one place where errors become words and exit codes.

What a command raises ends here: one or two lines on standard error (what failed, what to do), never a traceback, and
the exit code of the error's class (docs/exit-codes.md).  Ctrl-C and a closed pipe are silent, with a signal's code.

Commands are imported when they are used: a command that asks the server must not wait for the server's own modules.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import shell_complete

from nbdsnap import __version__
from nbdsnap.cli.context import Context
from nbdsnap.errors import NbdsnapError, from_exception

PROGRAM = "nbdsnap"

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as a shell reports it."""

EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE."""

COMPLETE_VARIABLE = "_NBDSNAP_COMPLETE"
"""Set by the shell's completion script: click answers it instead of running a command."""

COMMANDS = {
    "serve": "nbdsnap.cli.serve:serve",
    "volume": "nbdsnap.cli.volume:volume",
    "snapshot": "nbdsnap.cli.snapshot:snapshot",
    "clone": "nbdsnap.cli.clone:clone",
    "rollback": "nbdsnap.cli.rollback:rollback",
    "diff": "nbdsnap.cli.diff:diff",
    "send": "nbdsnap.cli.send:send",
    "receive": "nbdsnap.cli.receive:receive",
    "replicate": "nbdsnap.cli.replicate:replicate",
    "apply": "nbdsnap.cli.apply:apply",
    "delta": "nbdsnap.cli.delta:delta",
    "status": "nbdsnap.cli.status:status",
    "check": "nbdsnap.cli.check:check",
    "tls": "nbdsnap.cli.tls:tls",
    "demo": "nbdsnap.cli.demo:demo",
    "completion": "nbdsnap.cli.completion:completion",
}
"""In the order in which ``--help`` shows them."""


class LazyGroup(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), target
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Documentation: docs/ of the source. Exit codes: 0 done, 1 failed, 2 wrong command line, 3 wrong "
    "configuration, 4 not found, 5 in use or exists, 6 no space, 7 corruption found.",
)
@click.option(
    "--config",
    metavar="FILE",
    envvar="NBDSNAP_CONFIG",
    type=click.Path(path_type=Path),
    help="The configuration; without it $NBDSNAP_CONFIG, else /etc/nbdsnap/nbdsnap.toml.",
)
@click.version_option(__version__, prog_name="nbdsnap", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, config: Path | None) -> None:
    """Block devices over NBD, with snapshots.

    Management commands ask the running server; where none runs, they open the pool themselves.

    \b
    Example:
      nbdsnap --config nbdsnap.toml volume list
    """
    ctx.obj = Context(config)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    try:
        code = _invoke(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        _silence_stdout()
        if sys.stderr.isatty():
            click.echo(err=True)  # after the ^C that the terminal shows
        return EXIT_INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _report_usage(error)
    except Exception as error:
        code = _report(error)
        _flush_or_silence()
    return code


def _invoke(arguments: list[str]) -> int:
    """What click's own ``main`` does, but that errors are left to the caller."""
    instruction = os.environ.get(COMPLETE_VARIABLE)
    if instruction:
        importlib.import_module("nbdsnap.cli.completion")  # its bash replaces click's
        return shell_complete(cli, {}, PROGRAM, COMPLETE_VARIABLE, instruction)
    try:
        with cli.make_context(PROGRAM, arguments) as context:
            cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def _silence_stdout() -> None:
    """What is still buffered goes nowhere: else the interpreter, exiting, would complain of a closed pipe or wait for
    a full one."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush_or_silence() -> None:
    """After an error, which may have been that of writing the output."""
    try:
        sys.stdout.flush()
    except OSError:
        _silence_stdout()


def _report_usage(error: click.ClickException) -> int:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"try '{context.command_path} --help'" if context is not None else ""
    _print_error(error.format_message(), hint)
    return error.exit_code


def _report(error: Exception) -> int:
    known = from_exception(error)
    if known is None:
        if os.environ.get("NBDSNAP_DEBUG"):
            raise error
        known = NbdsnapError(
            f"unexpected {type(error).__name__}: {error}", hint="NBDSNAP_DEBUG=1 shows where; please report it"
        )
    _print_error(str(known), known.advice)
    return known.exit_code


def _print_error(message: str, hint: str) -> None:
    """One line, or two with a hint, whatever the texts hold."""
    click.echo("nbdsnap: " + " ".join(message.split("\n")), err=True)
    if hint:
        click.echo("  " + " ".join(hint.split("\n")), err=True)
