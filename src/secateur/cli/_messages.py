"""Advice in the words of the command line: functions of Python give it as their arguments."""

from __future__ import annotations

import ast
import re
import shlex

_LIST = re.compile(r"\b(include|exclude)=(\[[^\]]*\])")
_FLAG = re.compile(r"\b(strict|overwrite)=(True|False)\b")
_TEXT = re.compile(r"\b(remainder|method|pattern)=(['\"])([\w:.+-]+)\2")


def in_options(text: str) -> str:
    """Return a message with arguments of Python as options: ``exclude=['a.*']`` as ``--exclude 'a.*'``.

    Example:
        >>> from secateur.cli._messages import in_options
        >>> in_options("To leave both: exclude=['head', 'blocks.*.up'], or strict=False.")
        "To leave both: --exclude head --exclude 'blocks.*.up', or without --strict."
    """

    def options(found: re.Match[str]) -> str:
        try:
            values = ast.literal_eval(found[2])
        except (ValueError, SyntaxError):  # a list that is cut off, or an example
            return found[0]
        if not values or not all(isinstance(value, str) for value in values):
            return found[0]
        return " ".join(f"--{found[1]} {shlex.quote(value)}" for value in values)

    def flag(found: re.Match[str]) -> str:
        return f"--{found[1]}" if found[2] == "True" else f"without --{found[1]}"

    return _TEXT.sub(r"--\1 \3", _FLAG.sub(flag, _LIST.sub(options, text)))
