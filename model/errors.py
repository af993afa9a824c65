"""The error a person can mend, shared by every room because `model` stands on the ground."""


class UserError(Exception):
    """A mistake in the input, the configuration or the machine that a person can mend.

    The message is one line: it names the slide, file or key, says what was expected
    and what to do. The doors (`python -m ...`) print it without a traceback and exit with 2.
    """
