"""The examples in docstrings of public names are right."""

import doctest

import pytest

import iabn_hub
from iabn_hub.models import pretrained

WITH_EXAMPLES = {
    "InPlaceABN": iabn_hub.InPlaceABN,
    "convert": iabn_hub.convert,
    "convert_sync": iabn_hub.convert_sync,
    "create_model": iabn_hub.create_model,
    "inplace_abn": iabn_hub.inplace_abn,
    "list_models": iabn_hub.list_models,
    "load_pretrained": pretrained.load_pretrained,
    "to_batchnorm": iabn_hub.to_batchnorm,
    "use_backend": iabn_hub.use_backend,
}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name):
    tests = doctest.DocTestFinder(recurse=False).find(WITH_EXAMPLES[name], name, globs={})
    assert sum(len(test.examples) for test in tests) > 0
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.failed for result in results) == 0
