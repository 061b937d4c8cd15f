"""Waiting out temporary failures of a server: exponential pauses with jitter, or what the server asks for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

T = TypeVar("T")
TEMPORARY_STATUS = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that another attempt may change
FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles with each that follows
LONGEST_PAUSE = 120.0  # seconds; also the most of a server's Retry-After that is obeyed
ATTEMPTS = 5


def with_retries(
    call: Callable[[], T],
    is_temporary: Callable[[BaseException], bool],
    retry_after: Callable[[BaseException], float | None],
    before_pause: Callable[[BaseException, float], None] = lambda error, pause: None,
) -> T:
    """The result of `call`, which is repeated after temporary failures.

    Args:
        is_temporary: whether another attempt may succeed after this exception.
        retry_after: the pause in seconds that the server asked for, or None.
        before_pause: called with the exception and the seconds until the next attempt.

    Raises:
        The exception of the last attempt.
    """

    def pause(state: tenacity.RetryCallState) -> float:
        asked = retry_after(_error(state))
        usual = FIRST_PAUSE * 2 ** (state.attempt_number - 1)
        return min(usual * random.uniform(0.75, 1.25) if asked is None else asked, LONGEST_PAUSE)

    attempts: Any = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_temporary),
        wait=pause,
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        before_sleep=lambda state: before_pause(_error(state), state.next_action.sleep if state.next_action else 0.0),
        reraise=True,
    )
    result: T = attempts(call)
    return result


def _error(state: tenacity.RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None
    return error
