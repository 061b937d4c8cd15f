"""The operators as torch.compile makes them from the reference: for a GPU without a compiler for the native kernels.

Inductor fuses each into few passes over memory, with kernels in Triton, which comes with torch. It compiles at first
use, for seconds, and reads more often than the native kernels do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._inductor.exc

from .. import reference

_logger = logging.getLogger(__name__)
_RECOMPILE_LIMIT = 64  # dtypes, layouts and options of the layers in one process


@functools.cache
def _warn(reason: str) -> None:
    _logger.warning("torch.compile fails on the layer's operators, which run uncompiled: %s", reason)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    run = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal run
        try:
            with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
                return run(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as e:
            _warn(str(e).splitlines()[0])
            run = function
            return function(*arguments)

    return call


statistics = _compiled(reference.statistics)
normalize = _compiled(reference.normalize)
normalize_ = _compiled(reference.normalize_)
batch_normalize = _compiled(reference.batch_normalize)
batch_normalize_ = _compiled(reference.batch_normalize_)
gradient_sums = _compiled(reference.gradient_sums)
input_gradient = _compiled(reference.input_gradient)
batch_gradient = _compiled(reference.batch_gradient)
gradient_from_input = _compiled(reference.gradient_from_input)
update_statistics_ = reference.update_statistics_  # too small to compile
