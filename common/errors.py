"""The one error that is meant for the user: a line without a traceback."""

import errno

from common.escape import escape_terminal

_LONGEST = 1500
_ROOM = "free space, or choose another folder"
_RIGHTS = "fix its permissions, or those of its folder"
_DISK = "the disk or its server fails: run the same command again once it is sound"
_OF_THE_MACHINE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: "your quota is used up: free space, or choose another folder",
    errno.EFBIG: "a limit on the size of files: raise it (`ulimit -f unlimited`)",
    errno.EROFS: "choose another folder, or mount it so that it can be written",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENOTCONN: _DISK,
    errno.EMFILE: "raise the limit on open files (`ulimit -n`), or use fewer workers",
    errno.ENFILE: "the machine has too many open files: use fewer workers",
    errno.EAGAIN: "raise the limit on processes (`ulimit -u`), or use fewer workers",
    errno.ENOMEM: "free memory, raise its limit, or use fewer workers",
}
"""What to do about an error that is the machine's, not the program's."""


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


def describe_machine_error(error: BaseException) -> str:
    """In one line, an error of a disk, a limit or memory, with its file and what to do; else "".

    >>> describe_machine_error(OSError(28, "No space left on device", "/d/a.parquet"))
    '/d/a.parquet: No space left on device; free space, or choose another folder'
    """
    if isinstance(error, MemoryError):
        return f"there is not enough memory; {_OF_THE_MACHINE[errno.ENOMEM]}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"no thread can be started; {_OF_THE_MACHINE[errno.EAGAIN]}"
    if not isinstance(error, OSError) or error.errno not in _OF_THE_MACHINE:
        return ""
    # Of a library's errors only the text says which file.
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{what}; {_OF_THE_MACHINE[error.errno]}"
