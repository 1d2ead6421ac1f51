"""What an operator launches: in a CUDA graph each launch is a node, and at a small batch nodes are the time."""

import importlib
from unittest import mock

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from recfx.kernels.op import gpu_function

bench = importlib.import_module("bench.triton_sm90")

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
SMALL, LARGE = (26_000, 1000, 26, 9000, 16_384), (78_000, 3000, 26, 80_000, 131_072)
BY_SIZE = {
    SMALL: {"(in order)": ["sort_block", "merge_blocks"], "(samples)": ["add_samples"]},
    LARGE: {"(in order)": ["aten.sort", "take_sorted"], "(samples)": ["add_samples", "add_partial_sums"]},
}


def launches_of(module, name, sizes):
    return launches_with(module, name, bench.calls((8, 1), sizes)[module, name])


def launches_with(module, name, arguments):
    """The kernels and torch's operators of one call, in order, without those that only allocate or make a view."""
    launched = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view and func.overloadpacket.__name__ not in ALLOCATES:
                launched.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    operator = gpu_function(name)
    launch = mock.patch.object(JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    with launch, Operators():
        operator(*arguments)
    return launched


LAUNCHES = {
    "add_predictions_": ["(samples)"],
    "keep_trained_": ["aten.new_full", "mark_trained", "sum_kept", "renumber"],
    "untouch_rows_": ["untouch"],
    "finite_parts": ["look"],
    "order_ids": ["order_cells"],
    "order_ids_ends": ["order_cells"],
    "order_lists": ["aten.new_full", "count_ids", "order_positions"],
    "list_sums": ["sum_lists"],
    "find": ["find_rows"],
    "find_or_insert_": ["aten.new_full", "claim", "look_up", "number", "store_new"],
    "pool": ["aten.new_zeros", "mark_cells", "pool_cells", "add_unknown"],
    "pool_lists": ["pool_cells", "add_unknown"],
    "add_row_grads_": ["(in order)", "sum_chunks", "add_rows"],
    "add_row_grads_atomic_": ["add_atomically"],
    "clip_row_grads_": ["clip_rows"],
    "squared_norm": ["sum_squares", "aten.sum"],
    "sum_adamw_rows_": ["(in order)", "sum_chunks", "sum_adamw"],
    **{f"{name}_rows_": ["update_rows"] for name in ("adamw", "sgd", "adagrad", "rowwise_adagrad", "ftrl")},
    "adamw_rows_by_column_": ["update_rows"],
    "rehash_": ["aten.fill_", "aten.zero_", "place_rows"],
    "count_rows_": ["count_touched"],
    "count_candidates_": [
        "aten.new_full", "leave_out", "claim", "find_candidates", "(in order)", "count_occurrences", "store_counts",
    ],
    "farm_hashes": ["hash_strings"],
    "murmur_hashes": ["hash_strings"],
    "take_lists": ["aten.new_full", "sum_lengths", "take_columns"],
    "select_lists": ["select_numbers"],
    "cross_lists": ["aten.new_full", "key_lists", "claim", "flag_firsts", "count_pairs", "write_pairs"],
}  # fmt: skip


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_operators_take_few_launches(sizes):
    """Torch's sort is 13 nodes in a graph, its scan two: a batch of a thousand samples does without."""
    for module, name in bench.calls((8, 1), sizes):
        expected = [kernel for item in LAUNCHES[name] for kernel in BY_SIZE[sizes].get(item, [item])]
        assert launches_of(module, name, sizes) == expected, name


def test_gradients_of_a_sum_over_lookups_are_not_copied():
    """Autograd expands them."""
    arguments = [*bench.calls((8, 1), SMALL)["sum_adamw_rows", "sum_adamw_rows_"]]
    arguments[-2] = [block[:, :1].expand_as(block) for block in arguments[-2]]
    launched = launches_with("sum_adamw_rows", "sum_adamw_rows_", arguments)
    assert launched == ["sort_block", "merge_blocks", "sum_chunks", "sum_adamw"]
