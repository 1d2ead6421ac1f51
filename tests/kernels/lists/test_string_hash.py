import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.lists import string_hash
from tests.reference import on_threads
from tests.reference_features import STRINGS, fingerprint64, murmur64a, strings

HASHES = {
    "farm": (fingerprint64, string_hash.farm_definition, string_hash.farm_hashes),
    "murmur": (murmur64a, string_hash.murmur_definition, string_hash.murmur_hashes),
}
GOLDEN = {
    "farm": {
        b"\0\1\2": -7736835464683084646,
        b"\1\2\3": -5546720800891377920,
        b"abc": 2640714258260161385,
        b"": -7286425919675154353,
        b"hello": -5436999610281751320,
    },
    "murmur": {
        b"\0\1\2": -4003751876240412087,
        b"\1\2\3": -1042754718167355375,
        b"abc": -7148968302806999301,
        b"": 0,
    },
}
EVERY_LENGTH = [bytes((7 * n + 31 * i * i) % 256 for i in range(n)) for n in range(200)]


def hashed(op, items, **kwargs):
    column = strings(items, **kwargs)
    return op([column.values], [column.offsets])[0].tolist()


@pytest.mark.parametrize("name", HASHES)
def test_golden_values(name):
    for function in HASHES[name][1:]:
        assert hashed(function, GOLDEN[name]) == list(GOLDEN[name].values())


@pytest.mark.parametrize("name", HASHES)
@given(items=STRINGS, spare=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_kernel_is_definition_is_python(name, items, spare):
    oracle, definition, kernel = HASHES[name]
    expected = [oracle(item) for item in items]
    assert hashed(kernel, items, spare=spare) == expected
    assert hashed(definition, items, spare=spare) == expected


@pytest.mark.parametrize("name", HASHES)
def test_every_length_up_to_200(name):
    oracle, definition, kernel = HASHES[name]
    expected = [oracle(item) for item in EVERY_LENGTH]
    assert hashed(kernel, EVERY_LENGTH) == expected
    assert hashed(definition, EVERY_LENGTH) == expected


@pytest.mark.skipif(importlib.util.find_spec("farmhash") is None, reason="cityhash, a benchmark's peer, is absent")
def test_the_oracle_is_google_s_fingerprint():
    import farmhash

    google = [farmhash.Fingerprint64(item) for item in EVERY_LENGTH]
    assert [fingerprint64(item) % 2**64 for item in EVERY_LENGTH] == google


@pytest.mark.parametrize("name", HASHES)
def test_the_kernel_reads_inside_the_strings_alone(name):
    """The bytes around a string, other strings' and padding's, change nothing."""
    oracle, _, kernel = HASHES[name]
    for length in (1, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130):
        item = EVERY_LENGTH[length]
        for around in (b"\0" * 9, b"\xff" * 9):
            assert hashed(kernel, [around, item, around])[1] == oracle(item)


@pytest.mark.parametrize("name", HASHES)
def test_several_columns_and_threads_give_the_same_values(name):
    _, _, kernel = HASHES[name]
    columns = [strings(EVERY_LENGTH * 50), strings([]), strings([b"", b"abc"])]
    tensors = [c.values for c in columns], [c.offsets for c in columns]
    one, two = (on_threads(n, kernel, *tensors) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert [t.numel() for t in one] == [10_000, 0, 2]
    assert one[0].tolist() == hashed(kernel, EVERY_LENGTH) * 50


@pytest.mark.parametrize("name", HASHES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck(name):
    columns = [strings(EVERY_LENGTH[:70:3]), strings([b"a"], spare=3)]
    torch.library.opcheck(HASHES[name][2], ([c.values for c in columns], [c.offsets for c in columns]))
