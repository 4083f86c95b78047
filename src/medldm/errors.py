"""The exception for mistakes of users, and contexts that add keys or files to the messages of others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: the message is one line that names the file or key and the mend.

    Commands print it on stderr and leave with exit status 2. Every other exception is a defect of medldm and
    keeps its traceback.
    """


@contextmanager
def told_of(key: str, **keys: str) -> Iterator[None]:
    """A context in which a ValueError about the arguments of a part becomes an InputError about keys of the
    config: where the part stands at `key`, "film=x is none of ..." becomes "`key`.film=x is none of ...".
    `keys` has the keys of those arguments that do not stand under `key`.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # Hydra wraps what it calls
        if not isinstance(cause, ValueError) or isinstance(cause, InputError):
            raise
        name, equals, rest = str(cause).partition("=")
        if equals and name.replace(".", "").isidentifier():
            raise InputError(f"{keys.get(name, f'{key}.{name}')}={rest}") from error
        raise InputError(f"{key}: {cause}") from error


@contextmanager
def unreadable(message: str | Callable[[str], str]) -> Iterator[None]:
    """A context in which whatever a library raises while it reads a file becomes an InputError: bytes that
    anyone may have written can make it raise anything. `message` is the line, or makes it from the first line
    of the reason.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(message if isinstance(message, str) else message(reason)) from error
