"""The list of mutations fits the code: each breaks one place. That a test sees each is for helpers/mutations.py to show."""

import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.before.strip())
def test_fits_one_place(mutation):
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert source.count(mutation.before) == 1 and mutation.before != mutation.after
    assert all((ROOT / word).exists() for word in mutation.tests.split() if word.endswith(".py"))


def test_there_are_enough():
    assert len(set(MUTATIONS)) == len(MUTATIONS) >= 30
