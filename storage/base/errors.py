"""The one exception that means "the user can mend this".

Everything that is the user's to fix (a wrong path, a store made for another encoder, an unknown option) is raised as
`UserError` with one line that names the rule, the value and the fix. The commands print that line and exit with status
2; any other exception is a fault of ours and keeps its traceback. A message may repeat any name: what a terminal obeys
is spelled out in it.
"""

from storage.base.shown import one_line


class UserError(ValueError):
    """A mistake in the input; its message is one line: the rule, the value, the fix."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(str(message)))


class StoreError(UserError):
    """A store on disk is not what was asked for: absent, incomplete, damaged or made with another identity."""
