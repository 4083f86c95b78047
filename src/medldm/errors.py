"""The one exception that stands for a mistake of the user's."""


class InputError(ValueError):
    """Bad input: the message is one line that names the file or key and the mend.

    Commands print it on stderr and leave with exit status 2; every other exception is a defect of ours
    and keeps its traceback.
    """
