"""`casparian init`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from casparian_flow.cli import context


def init(
    ctx: typer.Context,
    folder: Annotated[
        str | None, typer.Argument(metavar="DIR", help="Where; else the current directory.")
    ] = None,
) -> None:
    """Make a configuration and its database here.

    What is there already is kept.
    """
    from casparian_flow import config

    file = Path(folder).absolute() / config.FILE_NAME if folder else config.named(ctx.obj)
    file = file or Path.cwd() / config.FILE_NAME
    if file.exists():
        context.say(f"{file} is there already")
    else:
        _write(file)
        context.say(f"wrote {file}")
    ctx.obj = str(file)
    with context.opened(ctx) as (settings, _):
        context.say(f"the database is {settings.database.path}")
    context.note(
        "next:\n  casparian source add DIR        the directory to watch"
        "\n  casparian publish PLUGIN        what makes rows of its files"
        "\n  casparian start                 watch and work"
    )


def _write(file: Path) -> None:
    """The one required table, and every default as a comment."""
    import glob

    from casparian_flow import atomic
    from casparian_flow.errors import ConfigError

    try:
        # A scan of this folder must not take the configuration for a file dropped there.
        atomic.own(file.parent, glob.escape(file.name))
        atomic.write_once(file, _text().encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {file}: {error.strerror}", "choose a folder that you can write to"
        ) from error


def _text() -> str:
    import msgspec

    from casparian_flow.config import Settings

    defaults: dict[str, Any] = msgspec.to_builtins(Settings(), enc_hook=str)
    lines = [
        "# Casparian Flow. Relative paths start at the folder of this file.",
        "",
        "[database]",
        f"db_location = {json.dumps(defaults['database']['db_location'])}",
        "",
        "# What follows are the defaults; docs/configuration.md says what each one means.",
    ]
    for section, values in defaults.items():
        if section not in ("home", "database"):
            lines += ["", f"# [{section}]"]
            lines += [f"# {name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"
