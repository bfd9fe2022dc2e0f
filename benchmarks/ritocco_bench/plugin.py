"""What `ritocco` finds of this package: the sub-command `ritocco bench`.

Light to import: the work is behind the function.
"""

from __future__ import annotations

import typer


def command(context: typer.Context) -> None:
    """Benchmarks against diffusers and between backends; `ritocco bench --help` lists them."""
    from ritocco_bench.__main__ import main

    raise typer.Exit(main(context.args, prog="ritocco bench"))


class Plugin:
    """See `ritocco.plugins.Plugin`."""

    def register(self, app: typer.Typer) -> None:
        """Add the sub-command, whose words are its own parser's."""
        every_word = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command("bench", context_settings=every_word, add_help_option=False)(command)


PLUGIN = Plugin()
