"""Units of work on their way to a worker and back: packed, run, answered, and what is said of one that fails."""

import pickle
import reprlib
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


class Units:
    """Units in a worker: ``(function, shared)``, as :func:`pack` sent it, is read for the first of them."""

    def __init__(self, common: bytes) -> None:
        self._bytes = common
        self._common: tuple[Any, Any] | None = None

    def run(self, message: bytes) -> Any:
        """The result of one, ``message`` being its item."""
        if self._common is None:
            self._common, self._bytes = unpack(self._bytes), b""
        function, shared = self._common
        return function(shared, unpack(message))


def pack(value: Any, dumps: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    """``value``, for another process.

    Raises:
        pickle.PicklingError: it cannot be pickled; with what to do.
    """
    try:
        return dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise pickle.PicklingError(
            f"units: cannot be sent to another process: {error}. Define tasks, losses and models by class and def at "
            "the top level of a module, and give data as tensors or by a function that loads them; or stay in this one"
        ) from error


def unpack(message: bytes) -> Any:
    """What :func:`pack` was given.

    Raises:
        ImportError: a class or function of it is not found here; with what to do.
    """
    try:
        return pickle.loads(message)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"units: a worker cannot import what it was sent: {error}. Put tasks, losses and models into a module that "
            "workers find: a file beside the script, or a package that is installed on every machine"
        ) from error


def answer(function: Any, shared: Any, item: Any) -> tuple[Any, str | None]:
    """What a unit gave and None; or its error, None in place of one that does not survive pickling, and traceback."""
    try:
        return function(shared, item), None
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, trace
        return error, trace


def fail(error: Exception | None, trace: str, what: str) -> NoReturn:
    """Raise the error of a unit, with ``what`` failed and the traceback as its cause."""
    told = RuntimeError(f"{what}:\n{trace}")
    if error is None:
        raise told
    raise error from told


def unit_name(function: Any, item: Any, index: int) -> str:
    """What a unit is called in errors.

    Example:
        >>> unit_name(divmod, (3, 4), 1)
        'unit 2, divmod of (3, 4),'
    """
    return f"unit {index + 1}, {getattr(function, '__qualname__', repr(function))} of {reprlib.repr(item)},"
