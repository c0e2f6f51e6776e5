"""The one exception that means "the user can mend this".

Everything that is the user's to fix (a wrong path, a store made for another encoder, an unknown option) is raised as
`UserError` with one line that names the rule, the value and the fix. The commands print that line and exit with status
2; any other exception is a fault of ours and keeps its traceback. A message may repeat any name: what a terminal obeys
is spelled out in it, and the middle of what is longer than a screen is left out, so that rule and fix stay.
"""

from storage.base.shown import one_line

MOST, HEAD, TAIL = 2500, 1500, 800  # characters of a message; of a longer one, from its beginning and its end


class UserError(ValueError):
    """A mistake in the input; its message is one line: the rule, the value, the fix."""

    def __init__(self, message: str = "") -> None:
        line = one_line(str(message))
        if len(line) > MOST:
            line = f"{line[:HEAD]} … ({len(line) - HEAD - TAIL:,} characters) … {line[-TAIL:]}"
        super().__init__(line)


class StoreError(UserError):
    """A store on disk is not what was asked for: absent, incomplete, damaged or made with another identity."""
