"""The exceptions of this package: all errors are a `CMambaError`, so one `except` catches them."""


class CMambaError(Exception):
    """Base class of every error this package raises on purpose."""


class InvalidArgumentError(CMambaError, ValueError):
    """An argument has a wrong value, shape or type: "`arg` must be <rule>, got <value>; <fix>"."""


class UsageError(InvalidArgumentError):
    """The options or arguments of a command are wrong; the command exits with 2."""


class BackendUnavailableError(CMambaError, RuntimeError):
    """A scan backend asked for by name cannot run here; the message says why and the fix."""


class MemoryLimitError(CMambaError, RuntimeError):
    """An image would take more memory than there is, or than was allowed."""


class BitstreamError(CMambaError, ValueError):
    """A file or string is damaged, truncated, of another model or of a newer format version."""


class UnsupportedFileError(BitstreamError):
    """A file may be valid, but needs a newer version of this package, or a higher limit."""


class ModelMismatchError(BitstreamError):
    """A file may be valid, but was made by a model that is not available."""


class PillowError(CMambaError, OSError):
    """Pillow cannot read or write a .cmb file; an `OSError`, as with its other formats."""


class ImageError(CMambaError, ValueError):
    """An image cannot be read, or is of a kind that this codec does not store.

    Attributes:
        reason: a few words to count refused files by, the same for every file; may be empty.
    """

    def __init__(self, message: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ImageWarning(UserWarning):
    """An image is read, and something in its file is left out; the message names both."""


class TargetError(CMambaError, RuntimeError):
    """No quality gives the size or the PSNR that was asked for; the message names the nearest."""


class WeightsError(CMambaError, RuntimeError):
    """Weights are missing, damaged, or do not fit the configuration beside them."""


class TrainingError(CMambaError, RuntimeError):
    """A training run cannot start or go on: its images, checkpoints or settings forbid it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or on a GPU."""
    # On the CPU torch reports that by a plain RuntimeError; its type for GPUs is one too.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    )


def explain(error: BaseException) -> str | None:
    """One line for the user about an error that correct code can meet; None for a mistake in it."""
    if is_out_of_memory(error):
        return "not enough memory for this image; encode a smaller one or use another --device"
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror}")
    if isinstance(error, CMambaError | OSError):
        return one_line(error)
    return None


def one_line(text: object) -> str:
    """Join lines, and escape control characters."""
    return printable(" ".join(str(text).split()))


def printable(text: object) -> str:
    """Escape line breaks and control characters: a file's name may hold any, for a terminal too."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
