"""How a command ends: what a user can mend becomes one line on stderr and a code; anything else keeps its traceback."""

import sys
import warnings
from collections.abc import Callable

from bayesrule.recipes.runs import Paused
from bayesrule.recipes.workers import Elsewhere, Workers


def say(words: str) -> None:
    """One line to stderr."""
    print("bayesrule:", " ".join(words.split()), file=sys.stderr)


def outcome(work: Callable[[], object], workers: Workers) -> int:
    """Do it and return the exit code: 0, 2 for what the user can mend, 130 if interrupted.

    Of several processes the first one speaks; what another one alone has to complain of, that one says.
    """

    def refuse(reason: str) -> int:
        if workers.says(reason):
            say(reason)
        return 2

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}") if workers.is_first else None
            work()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as after `| head`
        return 0
    except Elsewhere as other:
        return refuse(str(other)) if workers.is_first and str(other) else 2
    except OSError as error:
        return refuse(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValueError as error:
        return refuse(str(error))
    except MemoryError:
        return refuse("there is not enough memory; take a smaller --batch-size, --size or --model")
    except (KeyboardInterrupt, Paused) as stop:
        if workers.is_first:
            say(str(stop) or "interrupted; nothing was kept")
        return 130
    return 0
