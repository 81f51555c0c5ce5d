"""How the command line says its errors: one line each, by one process of a run of several."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import typer

# Its home differs between typer's releases, some of which bring their own copy of click.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

# An option that is a setting with dashes in front: its key, and its value where that follows a =.
_DASHED_SETTING = re.compile(r"--?([A-Za-z_]\w*\.\w[\w.]*)(?:=(.*))?", re.DOTALL)
# torchrun ends all ranks when one has ended: the others give rank 0, which may be slower, this long to say the error.
_WAIT_S = 3


def is_first_rank() -> bool:
    """Whether this process is the only one of its run, or rank 0 of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say_error(line: str, *, is_shared: bool) -> None:
    """Prints an error on stderr. Ranks but the first leave it to that one, which has it too.

    is_shared: no rank can be without it. Otherwise a rank that is still there after a while says it itself.
    """
    if not is_first_rank():
        time.sleep(_WAIT_S)
        if is_shared:
            return
    print(f"error: {line}", file=sys.stderr)


def asks_for_help(error: Any) -> bool:
    """Whether a usage error is a command without arguments, whose message is its help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def usage_line(error: Any, root: Any, arguments: Sequence[str]) -> str:
    """A `UsageError` in one line: what, given, needed. `arguments` are those that the command `root` was given."""
    command, path = _command(root, arguments)
    remedy = f"`{path} --help` says what there is"
    options = {name: parameter for parameter in command.params for name in parameter.opts}
    message = " ".join(error.format_message().split()).rstrip(".")
    kind = type(error).__name__
    if unknown := re.match(r"No such command '(.*?)'", message):
        return f"no such command {unknown[1]!r}; {_nearest(unknown[1], list(command.commands))}"
    if kind == "NoSuchOption":
        takes_settings = any(parameter.name == "overrides" for parameter in command.params)
        if takes_settings and (line := _dashed_setting(error.option_name, arguments)):
            return line
        if command is not root and any(error.option_name in parameter.opts for parameter in root.params):
            return f"{error.option_name} comes before the verb: {path.replace(' ', f' {error.option_name} ', 1)} ..."
        names = [name for name in options if name.startswith("--")]
        return f"no such option {error.option_name}; {_nearest(error.option_name, [*names, '--help'])}"
    if kind == "BadOptionUsage" and message.endswith("requires an argument"):
        metavar = getattr(options.get(error.option_name), "metavar", None)
        return f"{error.option_name} needs a value{f', {metavar}' if metavar else ''}; {remedy}"
    if kind == "BadParameter" and (given := _given(error.param, arguments)):
        reason = error.message.removeprefix("Value error, ").rstrip(".")
        return f"{given}: {reason[:1].lower()}{reason[1:]}; {remedy}"
    return f"{message[:1].lower()}{message[1:]}; {remedy}"


def _command(root: Any, arguments: Sequence[str]) -> tuple[Any, str]:
    """The command that the arguments name, and how it is called: not every usage error knows."""
    command, path = root, "packloop"
    for argument in arguments:
        if argument in getattr(command, "commands", ()):
            command, path = command.commands[argument], f"{path} {argument}"
    return command, path


def _nearest(given: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    return f"nearest: {near[0]}" if near else f"allowed: {', '.join(allowed)}"


def _dashed_setting(option: str, arguments: Sequence[str]) -> str | None:
    """The line for an option that is a setting with dashes, as `option` or, of one dash, its first letter says."""
    for index, argument in enumerate(arguments):
        setting = _DASHED_SETTING.fullmatch(argument)
        if setting is None or not argument.startswith(option):
            continue
        key, value = setting.groups()
        if value is None:
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            value = "VALUE" if not following or following.startswith("-") or "=" in following else following
        shown = argument.partition("=")[0]
        return f"no such option {shown}: settings are written {shlex.quote(f'{key}={value}')}, without dashes"
    return None


def _given(parameter: Any, arguments: Sequence[str]) -> str | None:
    """Option and value as they were given; None for what is no option."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if parameter is not None and name.startswith("-") and name in parameter.opts:
            return f"{name} {value if equals else ''.join(arguments[index + 1 : index + 2])}"
    return None
