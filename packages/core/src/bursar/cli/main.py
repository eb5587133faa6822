"""The command group `bursar`: its own commands load when asked for, other packages add theirs by entry point."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

import click

from bursar.cli.options import printable
from bursar.errors import BursarError

# name -> module and the click command in it
_OWN = {
    **{
        name: f"bursar.cli.{name}:command"
        for name in (
            "audit",
            "drain",
            "erase",
            "policy",
            "price",
            "prices",
            "prune",
            "records",
            "recover",
            "replay",
            "run",
            "status",
        )
    },
    **{
        name: f"bursar.cli.operate:{name}"
        for name in ("alerts", "approvals", "approve", "deny", "freeze", "operator", "release", "resume")
    },
    "raise": "bursar.cli.operate:raise_limit",
    "exposure": "bursar.cli.exposure:command",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*_OWN, *(point.name for point in entry_points(group="bursar.commands"))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _OWN:
            module, _, name = _OWN[cmd_name].partition(":")
            command = getattr(import_module(module), name)
        else:
            found = [point for point in entry_points(group="bursar.commands") if point.name == cmd_name]
            if not found:
                return None
            command = found[0].load()
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BursarError as error:
            raise click.ClickException(printable(str(error))) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bursar", prog_name="bursar")
def main() -> None:
    """Bursar: budgets for AI agents, in process."""
