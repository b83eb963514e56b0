"""Matches regular expressions from untrusted files, with a time limit.

`re` has no time limit: "(a+)+$" on thirty letters takes hours.
"""

import time
from collections.abc import Iterable

import regex

from cascade.weights.errors import WeightsError, shortened

SECONDS = 2.0


def matching(pattern: str, texts: Iterable[str], where: object, *, whole: bool = False) -> list[str]:
    """The texts in which a pattern is found.

    Args:
        pattern: as of `re`.
        texts: to be searched.
        where: the source of the pattern, for errors.
        whole: whether it must match the end of a dotted name, from a dot or the beginning on, as PEFT matches.

    Raises:
        WeightsError: it is not a valid pattern, or takes over 2 s.
    """
    deadline = time.monotonic() + SECONDS
    try:
        compiled = regex.compile(rf"(?:.*\.)?(?:{pattern})" if whole else pattern)
        search = compiled.fullmatch if whole else compiled.search
        found = []
        for text in texts:
            if search(text, timeout=max(deadline - time.monotonic(), 0.001)):
                found.append(text)
    except (regex.error, TimeoutError, OverflowError, RecursionError) as error:
        why = "takes too long" if isinstance(error, TimeoutError) else f"is not a valid pattern: {shortened(error, 60)}"
        raise WeightsError(f"{where}: the regular expression {shortened(repr(pattern), 60)} {why}.") from error
    return found
