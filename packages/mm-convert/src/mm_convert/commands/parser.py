"""The parser of one command: jsonargparse's, which also says what was meant by an option that there is not."""

from __future__ import annotations

import re
from difflib import get_close_matches

from jsonargparse import ArgumentParser

UNKNOWN = re.compile(r"unrecognized arguments: (--[^\s=]+)|Group '(\w+)' does not accept option '([^']+)'")


class CommandParser(ArgumentParser):  # type: ignore[misc]  # jsonargparse is not checked
    """A parser whose errors about unknown options name the nearest known one."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """End the program, with the words of jsonargparse and a guess."""
        found = UNKNOWN.search(message)
        if found:
            given = found[1] or f"--{found[2]}.{found[3]}"
            known = [option for action in self._actions for option in action.option_strings]
            near = get_close_matches(given, known, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message, ex)
