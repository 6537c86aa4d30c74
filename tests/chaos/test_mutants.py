"""The list of mutants speaks of the code as it is: a quote that no longer stands there would prove nothing."""

import pytest

from tests.chaos.mutants import MUTANTS, Mutant
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.handling)
def test_a_mutant_quotes_one_place_and_names_tests_that_exist(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.source) == 1
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()
