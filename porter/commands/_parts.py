"""A verb with parts: `porter parity PORT`, and beside it `porter parity record` and `porter parity compare`."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import click


class WithParts(click.Command):
    """A command whose first word may name another one instead, imported when it does.

    Something of the user's that is really called like a part is reached as `./record`.
    """

    parts: ClassVar[dict[str, str]] = {}  # name -> its line in the help; its module is porter.commands.<verb>_<name>

    def part(self, name: str) -> click.Command:
        """The command of a part."""
        command = importlib.import_module(f"porter.commands.{self.name}_{name}").command
        assert isinstance(command, click.Command)
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in self.parts:
            return self.part(args[0]).make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        with formatter.section("Instead of PORT"):
            formatter.write_dl(list(self.parts.items()))
