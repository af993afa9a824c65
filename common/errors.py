"""The one error that is meant for the user: a line without a traceback."""

from common.escape import escape_terminal

_LONGEST = 1500


class UserError(Exception):
    """A mistake in the input, the configuration or the machine that the user can fix.

    The message is one line: it names the slide, file or key, says what was expected
    and what to do. The doors (`python -m ...`) print it without a traceback and exit with 2.
    Names from files come into it: control characters, which would break the line or steer the
    terminal, become spaces, and a message of more than 1,500 characters is cut.

    >>> str(UserError("slide a\\x1b[31m.svs: no level at 0.5 mpp"))
    'slide a [31m.svs: no level at 0.5 mpp'
    """

    def __init__(self, message: object = "") -> None:
        text = escape_terminal(str(message))
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")
