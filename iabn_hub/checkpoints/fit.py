"""Whether a state dict is the one a network needs: every key that is missing, extra or misshapen, by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .errors import CheckpointError
from .legacy import to_current

_logger = logging.getLogger(__name__)
SHOWN = 5  # names listed of each kind before '… and N more'


def fit(state_dict: Mapping[str, Any], model: nn.Module, new_classifier: bool = False) -> dict[str, Any]:
    """The state dict in our layout, after checking it against `model`; for timm's `pretrained_filter_fn`.

    timm adapts the classifier and the first convolution afterwards and loads the rest without complaint about
    missing keys, so that a wrong file would leave random weights behind. Here it is refused.

    Args:
        new_classifier: the caller asked for a number of classes: if the weights have another one, the classifier
            stays as it was drawn, and a warning says so.

    Raises:
        CheckpointError: keys are missing, extra, misshapen or not tensors; the message lists them.
    """
    given = to_current(state_dict)
    expected = model.state_dict()
    cfg: Any = model.pretrained_cfg
    classifier = given.get(f"{cfg['classifier']}.weight")
    adapted = {f"{cfg['first_conv']}.weight"} if getattr(model, "in_chans", 3) != 3 else set()
    if new_classifier and isinstance(classifier, Tensor) and classifier.dim() == 2:
        # What the file holds decides whether timm keeps its classifier, whatever the configuration says.
        cfg["num_classes"] = len(classifier)
        if len(classifier) != model.num_classes:
            adapted |= {name for name in {*given, *expected} if name.startswith(f"{cfg['classifier']}.")}
            if model.num_classes:
                _logger.warning(
                    "the classifier is new: the weights have %d classes, the network %s",
                    len(classifier),
                    model.num_classes,
                )

    # Files older than torch 0.4.1 do not count batches; the layer starts that count at 0.
    missing = [n for n in expected if n not in given and n not in adapted and not n.endswith(".num_batches_tracked")]
    extra = [n for n in given if n not in expected and n not in adapted]
    shared = [n for n in expected if n in given]
    strange = [f"{n} is a {type(given[n]).__name__}" for n in shared if not isinstance(given[n], Tensor)]
    misshapen = [
        f"{n} is {tuple(given[n].shape)}, expected {tuple(expected[n].shape)}"
        for n in shared
        if isinstance(given[n], Tensor) and n not in adapted and given[n].shape != expected[n].shape
    ]
    kinds = {"missing": missing, "not expected": extra, "misshapen": misshapen, "not tensors": strange}
    problems = [f"{kind}: {_list(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"these weights do not belong to {cfg.get('architecture', type(model).__name__)}: " + "; ".join(problems)
        )
    return given


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
