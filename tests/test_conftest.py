"""What tests/conftest.py says of the other files holds."""

from pathlib import Path

from tests.conftest import LONGEST


def test_the_files_that_come_first_exist():
    assert not [name for name in LONGEST if not (Path(__file__).parents[1] / name).is_file()]
    assert len(set(LONGEST)) == len(LONGEST)
