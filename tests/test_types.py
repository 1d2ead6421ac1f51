import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.types import ALIGN_BYTES, Batch, Layout, Ragged, pack, unpack
from tests.reference import EXTREMES, ragged


@st.composite
def columns(draw):
    """Dense and ragged columns of several types with one number of samples, zero included."""
    samples, out = draw(st.integers(0, 5)), {}
    for i in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["f32", "i64", "f64", "ragged i64", "ragged f32", "weighted", "nested"]))
        if kind.startswith("ragged"):
            items = st.lists(st.lists(st.sampled_from(EXTREMES), max_size=3), min_size=samples, max_size=samples)
            dtype = torch.int64 if kind.endswith("i64") else torch.float32
            out[f"x{i}"] = ragged(draw(items), spare=draw(st.integers(0, 20)), dtype=dtype)
        elif kind in ("weighted", "nested"):
            inner = ragged(
                draw(st.lists(st.lists(st.integers(0, 255), max_size=3), min_size=samples, max_size=samples))
            )
            weights = torch.rand(inner.values.shape) if kind == "weighted" else None
            outer = (torch.arange(samples + 1, dtype=torch.int32),) if kind == "nested" else ()
            out[f"x{i}"] = inner._replace(weights=weights, outer=outer)
        else:
            dtype = {"f32": torch.float32, "i64": torch.int64, "f64": torch.float64}[kind]
            out[f"x{i}"] = torch.arange(samples * 3).view(samples, 3).to(dtype)
    return out


def assert_same_columns(a, b):
    assert set(a) == set(b)
    for name in a:
        assert type(a[name]) is type(b[name])
        for x, y in zip(
            a[name].parts.values() if isinstance(a[name], Ragged) else [a[name]],
            b[name].parts.values() if isinstance(b[name], Ragged) else [b[name]],
            strict=True,
        ):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@given(given_columns=columns())
@settings(max_examples=100, deadline=None)
def test_pack_is_undone_by_reading(given_columns):
    batch = pack(given_columns)
    first = next(iter(given_columns.values()))
    num_samples = first.num_samples if isinstance(first, Ragged) else first.shape[0]
    expected = given_columns | {"num_samples": torch.tensor(num_samples, dtype=torch.int32)}
    assert_same_columns(dict(batch), expected)
    assert_same_columns(unpack(batch.sections, batch.layout), expected)
    assert_same_columns(dict(Batch(batch.buffer.clone(), batch.layout)), expected)
    assert_same_columns(dict(pack(batch)), expected)


@given(given_columns=columns())
@settings(max_examples=50, deadline=None)
def test_layout_is_aligned_and_without_overlap(given_columns):
    layout = pack(given_columns).layout
    spans = []
    for dtype, first, _ in layout.sections:
        assert first % ALIGN_BYTES == 0
        for f in layout.fields:
            if f.dtype == dtype:
                begin = first + f.start * dtype.itemsize
                assert begin % ALIGN_BYTES == 0
                spans.append((begin, begin + torch.Size(f.shape).numel() * dtype.itemsize))
    spans = sorted(span for span in spans if span[0] < span[1])
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert not spans or spans[-1][1] <= layout.num_bytes


def test_columns_are_views_of_one_buffer():
    batch = pack({"x": torch.ones(2, 1), "c": ragged([[5], [6]])})
    batch["x"].fill_(3)
    batch["c"].values.fill_(9)
    again = Batch(batch.buffer, batch.layout)
    assert again["x"].tolist() == [[3], [3]]
    assert again["c"].values.tolist() == [9, 9]


def test_pack_copies():
    x = torch.ones(2, 1)
    batch = pack({"x": x})
    batch["x"].zero_()
    assert x.tolist() == [[1], [1]]


def test_layouts_compare_by_shape():
    a, b = (pack({"x": torch.full((2, 1), v), "c": ragged([[5], [6]])}).layout for v in (1.0, 2.0))
    assert a is b  # comparing two takes longer than a step's look-up should
    assert a != pack({"x": torch.ones(3, 1), "c": ragged([[5], [6], []])}).layout
    assert a != pack({"y": torch.ones(2, 1), "c": ragged([[5], [6]])}).layout
    assert isinstance(a, Layout)


def test_a_layout_from_another_process_is_found():
    """Hashes of strings differ between processes, so the one kept there must not travel."""
    program = """if True:
        import pickle, sys, torch
        from recfx.types import pack
        layout = pack({"x": torch.ones(2, 1)}).layout
        hash(layout), layout.columns
        sys.stdout.buffer.write(pickle.dumps(layout))"""
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, timeout=60)
    layout = pack({"x": torch.ones(2, 1)}).layout
    other = pickle.loads(done.stdout)
    assert other is layout


def test_num_samples_is_kept_when_given():
    batch = pack({"x": torch.ones(4, 1), "num_samples": torch.tensor(3, dtype=torch.int32)})
    assert int(batch["num_samples"]) == 3


@given(given_columns=columns(), more=st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_pack_pads_to_a_layout(given_columns, more):
    """Packed values come first, then empty lists and zeros."""
    batch = pack(given_columns)
    num_samples = int(batch["num_samples"])
    room = {
        (f.name, f.part): (f.dtype, (f.shape[0] + more, *f.shape[1:]) if f.shape else ()) for f in batch.layout.fields
    }
    padded = pack(given_columns, layout=Layout.of(room))
    assert int(padded["num_samples"]) == num_samples
    for name, column in given_columns.items():
        if isinstance(column, Ragged):
            for part, t in column.parts.items():
                is_offsets = part not in ("values", "weights")
                tail = t[-1:].expand(more) if is_offsets else t.new_zeros(more)
                assert torch.equal(padded[name].parts[part], torch.cat([t, tail]))
        else:
            assert torch.equal(padded[name], torch.cat([column, column.new_zeros(more, 3)]))


def test_pack_rejects_what_a_layout_does_not_hold():
    columns = {"x": torch.ones(2, 1), "c": ragged([[5], [6]])}
    layout = pack(columns).layout
    for wrong, words in (
        ({"c": ragged([[5, 6, 7], [8]])}, r"column 'c': got values torch.int64 \[4\], expected torch.int64 of at most"),
        ({"c": ragged([[5], [6]], dtype=torch.float32)}, r"column 'c': got values torch.float32 \[2\], expected"),
        (
            {"x": torch.ones(2, 2)},
            r"column 'x': got dense torch.float32 \[2, 2\], expected .* \[2, 1\], .* Split the batch",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            pack(columns | wrong, layout=layout)
    with pytest.raises(ValueError, match=r"columns: got .'num_samples dense', 'x dense'., expected .'c offsets', "):
        pack({"x": torch.ones(2, 1)}, layout=layout)
    with pytest.raises(TypeError, match=r"layout: got Batch, expected Layout\. Use `batch.layout`"):
        pack(columns, layout=pack(columns))


def test_errors():
    with pytest.raises(ValueError, match=r"columns: got {'x': 2, 'c': 3} samples, expected one number"):
        pack({"x": torch.ones(2, 1), "c": ragged([[], [], []])})
    with pytest.raises(TypeError, match="column 'x': got list, expected Tensor or Ragged"):
        pack({"x": [1.0]})
    batch = pack({"x": torch.ones(2, 1)})
    with pytest.raises(ValueError, match=rf"buffer: got {batch.layout.num_bytes - 1} bytes, expected"):
        Batch(batch.buffer[:-1], batch.layout)
