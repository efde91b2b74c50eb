"""``nbdsnap completion``: click's own completion, with one correction for bash.

bash begins a word at ``@`` (COMP_WORDBREAKS): ``vol@mon`` would reach click as two words, and only ``@mon`` is replaced
by what we answer.  So our bash script hands the whole line over, and takes off what bash keeps.
"""

from __future__ import annotations

import os

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete, add_completion_class
from click.shell_completion import split_arg_string as split_words

from nbdsnap.cli.main import COMPLETE_VARIABLE

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local line=${COMP_LINE:0:COMP_POINT}
    local word=${line##*[[:space:]]}
    local kept='' reply item kind value
    if [[ $COMP_WORDBREAKS == *@* && $word == *@* ]]; then
        kept=${word%%@*}
    fi
    reply=$(env COMP_LINE=$line %(complete_var)s=bash_complete "$1")
    COMPREPLY=()
    for item in $reply; do
        kind=${item%%%%,*}
        value=${item#*,}
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                [[ $value == *@ ]] && compopt -o nospace
                COMPREPLY+=("${value#"$kept"}")
                ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class LineBashComplete(BashComplete):
    """bash, by the line instead of by bash's words."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_words(line)
        incomplete = "" if not words or line[-1:].isspace() else words.pop()
        return words[1:], incomplete


SHELLS: dict[str, type[ShellComplete]] = {"bash": LineBashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command()
@click.argument("shell", type=click.Choice(tuple(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL, to be read by it.

    \b
    Example:
      nbdsnap completion bash > /etc/bash_completion.d/nbdsnap
      nbdsnap completion zsh > ~/.zfunc/_nbdsnap
      nbdsnap completion fish > ~/.config/fish/completions/nbdsnap.fish
    """
    root = ctx.find_root().command
    click.echo(SHELLS[shell](root, {}, "nbdsnap", COMPLETE_VARIABLE).source())
