"""Everything that porter refuses or reports, with the exit code that the command line ends in.

    PorterError                     7  internal error (a plain PorterError is never raised on purpose)
    +-- CheckFailed                 1  it ran, and a check failed: parity, verification
    +-- UsageError                  2  options that contradict each other or name nothing
    +-- AccessError                 3  gated, private, or no valid token
    +-- MissingError                4  no such path or repository, offline, unreachable
    +-- ResourceError               5  out of memory or disk, or the output cannot be written
    +-- BadInputError               6  corrupt, truncated, hostile or unknown input
        +-- CheckpointError         6  a weights file that breaks its format
        +-- RecipeError             6  rules that do not account for every tensor exactly once

Each error says what went wrong, what was expected, what was found, and what to try next.
"""

from __future__ import annotations

# Control characters except newline and tab, and the marks that turn the direction of writing.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}
_CONTROLS |= {
    code: f"\\u{code:04x}" for code in (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}


def visible(text: str) -> str:
    """`text` with its control characters spelled out: names from a model must not steer the terminal."""
    return text.translate(_CONTROLS)


class PorterError(Exception):
    """Base of all of porter's errors.

    Args:
        what: one sentence naming the thing that failed.
        expected: what should have been there.
        found: what was there instead.
        hint: the next command or step, as the user would type it.
    """

    exit_code = 7

    def __init__(
        self, what: str, *, expected: str | None = None, found: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.expected, self.found, self.hint = what, expected, found, hint

    def lines(self) -> list[str]:
        """The message as labelled lines, without styling or control characters."""
        parts = (("expected", self.expected), ("found", self.found), ("next", self.hint))
        more = [f"  {label + ':':<10}{visible(text)}" for label, text in parts if text]
        # A value's own lines never look like ours.
        return [visible(self.what).replace("\n", "\n    "), *(line.replace("\n", "\n" + 12 * " ") for line in more)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class CheckFailed(PorterError):
    exit_code = 1


class UsageError(PorterError):
    exit_code = 2


class AccessError(PorterError):
    exit_code = 3


class MissingError(PorterError):
    exit_code = 4


class ResourceError(PorterError):
    exit_code = 5


class BadInputError(PorterError):
    exit_code = 6


class CheckpointError(BadInputError):
    pass


class RecipeError(BadInputError):
    pass
