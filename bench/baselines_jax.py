"""DeepFM in plain JAX: the step with dense tables in donated buffers, and a loop over ORC files.

The same tricks as in the torch functional baseline where they are fast in XLA: positions scattered instead of sorted,
one gather and one scatter of whole rows (weights next to their AdamW moments) per distinct row, gradients by segment
sum.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from pyarrow import orc

LR, WEIGHT_DECAY, B1, B2, EPS = 1e-3, 0.01, 0.9, 0.999, 1e-8
TABLES = ("embedding", "bias")
NUM_COLUMNS, NUM_NUMERICS, DIM = 26, 13, 8
WIDTH = DIM + 1


class State(NamedTuple):
    dense: dict[str, Array]
    m: dict[str, Array]
    v: dict[str, Array]
    rows: Array  # f32 [C + 1, 27]: embedding and bias, their m, their v; last = padding
    last_seen: Array  # i32 [C + 1], scratch: a position of the row's id in the current batch
    max_distinct: Array  # i32 [], the most distinct rows of any batch; above the capacity the run is invalid
    t: Array  # i32 []


class Batch(NamedTuple):
    """DenseBatch of workload.py as numpy or jax arrays."""

    row: Any  # i32 [26, B]
    num: Any  # f32 [B, 13]
    label: Any  # f32 [B, 1]


class Baseline(NamedTuple):
    step: Callable[[Batch], Array]
    weights: Callable[[], dict[str, np.ndarray]]  # the current weights, by the names of init_weights
    max_distinct: Callable[[], int]


def compiled(weights: dict[str, np.ndarray], *, max_distinct: int, loss: Callable[..., Array]) -> Baseline:
    """The step under jit with a donated state.

    Args:     weights: of workload.init_weights, as numpy arrays.
              max_distinct: static bound on distinct rows per batch, the padding row included.
              loss: `loss_fn`, or `textbook_loss`.
    """
    state = init(weights)
    jitted = jax.jit(partial(train_step, capacity=max_distinct, loss_fn=loss), donate_argnums=0)

    def step(batch: Batch) -> Array:
        nonlocal state
        state, loss = jitted(state, batch)
        return loss

    def present() -> dict[str, np.ndarray]:
        tables = {"embedding": state.rows[:, :DIM], "bias": state.rows[:, DIM:WIDTH]}
        return {name: np.array(w) for name, w in (state.dense | tables).items()}

    return Baseline(step, present, lambda: int(state.max_distinct))


def init(weights: dict[str, np.ndarray]) -> State:
    dense = {n: jnp.array(w) for n, w in weights.items() if n not in TABLES}
    rows = np.zeros((len(weights["bias"]), 3 * WIDTH), np.float32)
    rows[:, :DIM], rows[:, DIM:WIDTH] = weights["embedding"], weights["bias"]
    m, v = ({n: jnp.zeros_like(w) for n, w in dense.items()} for _ in range(2))
    return State(dense, m, v, jnp.array(rows), jnp.zeros(len(rows), jnp.int32), jnp.int32(0), jnp.int32(0))


def train_step(state: State, batch: Batch, *, capacity: int, loss_fn: Callable[..., Array]) -> tuple[State, Array]:
    batch_size, padding = len(batch.num), len(state.rows) - 1
    t = state.t + 1
    last_seen, slot, index_U, num_distinct = unique(state.last_seen, batch.row.reshape(-1), capacity)
    slot_BF = slot.reshape(NUM_COLUMNS, batch_size).T
    rows_U = state.rows[index_U]
    emb, bias_BF = rows_U[:, :DIM][slot_BF].reshape(batch_size, -1), rows_U[:, DIM][slot_BF]
    loss, (g_dense, g_emb, g_bias) = jax.value_and_grad(loss_fn, argnums=(0, 1, 2))(
        state.dense, emb, bias_BF, batch.num, batch.label
    )

    pool = partial(jax.ops.segment_sum, segment_ids=slot_BF.reshape(-1), num_segments=capacity)
    g_U = jnp.concatenate([pool(g_emb.reshape(-1, DIM)), pool(g_bias.reshape(-1, 1))], 1)
    g_U *= (index_U < padding)[:, None]  # no gradient for the padding row
    w_U, m_U, v_U = jnp.split(rows_U, 3, 1)
    rows = state.rows.at[index_U].set(jnp.concatenate(adamw(w_U, g_U, m_U, v_U, t), 1))
    new = {n: adamw(w, g_dense[n], state.m[n], state.v[n], t) for n, w in state.dense.items()}
    dense, m, v = ({n: x[i] for n, x in new.items()} for i in range(3))
    return State(dense, m, v, rows, last_seen, jnp.maximum(state.max_distinct, num_distinct), t), loss


def unique(last_seen: Array, index: Array, capacity: int) -> tuple[Array, Array, Array, Array]:
    """The number of each index among the distinct ones, and the distinct indices, padded with the padding row."""
    position = jnp.arange(len(index), dtype=jnp.int32)
    last_seen = last_seen.at[index].set(position)
    winner = last_seen[index]
    rank = jnp.cumsum((winner == position).reshape(NUM_COLUMNS, -1), 1, dtype=jnp.int32)  # two levels: faster
    before = jnp.cumsum(rank[:, -1]) - rank[:, -1]
    slot = (rank + before[:, None] - 1).reshape(-1)[winner]
    index_U = jnp.full(capacity, len(last_seen) - 1, jnp.int32).at[slot].set(index, mode="drop")
    return last_seen, slot, index_U, before[-1] + rank[-1, -1]


def loss_fn(p: dict[str, Array], emb: Array, bias_BF: Array, num_BN: Array, label_B1: Array) -> Array:
    """The formula with sums over fields as one product; emb is [B, 26 * 8]."""
    num_const = NUM_NUMERICS * DIM  # the numeric embeddings enter the MLP unscaled: constant over the batch
    w1_num, w1_emb = p["w1"][:, :num_const], p["w1"][:, num_const:]
    hidden_width = len(w1_emb)
    product = emb @ jnp.concatenate([w1_emb.T, jnp.tile(jnp.eye(DIM), (NUM_COLUMNS, 1))], 1)
    total = product[:, hidden_width:] + num_BN @ p["numeric_embedding"]
    hidden = jax.nn.relu(product[:, :hidden_width] + p["b1"] + w1_num @ p["numeric_embedding"].reshape(-1))
    hidden = jax.nn.relu(hidden @ p["w2"].T + p["b2"])
    num_squares = jnp.square(num_BN) @ jnp.square(p["numeric_embedding"]).sum(1)
    second = 0.5 * (jnp.square(total).sum(1) - jnp.square(emb).sum(1) - num_squares)
    first = bias_BF.sum(1) + (num_BN @ p["numeric_bias"])[:, 0]
    logit = first + second + (hidden @ p["w3"].T)[:, 0] + p["b3"]
    label = label_B1[:, 0]
    return (jax.nn.softplus(logit) - label * logit).mean()


def textbook_loss(p: dict[str, Array], emb: Array, bias_BF: Array, num_BN: Array, label_B1: Array) -> Array:
    """The formula as published."""
    batch_size = len(num_BN)
    numeric = jnp.broadcast_to(p["numeric_embedding"], (batch_size, NUM_NUMERICS, DIM))
    emb = jnp.concatenate([numeric, emb.reshape(batch_size, NUM_COLUMNS, DIM)], 1)
    bias = jnp.concatenate([jnp.broadcast_to(p["numeric_bias"][:, 0], (batch_size, NUM_NUMERICS)), bias_BF], 1)
    scale = jnp.concatenate([num_BN, jnp.ones((batch_size, NUM_COLUMNS))], 1)
    scaled = scale[:, :, None] * emb
    second = 0.5 * (jnp.square(scaled.sum(1)) - jnp.square(scaled).sum(1)).sum(1)
    hidden = jax.nn.relu(emb.reshape(batch_size, -1) @ p["w1"].T + p["b1"])
    hidden = jax.nn.relu(hidden @ p["w2"].T + p["b2"])
    logit = (scale * bias).sum(1) + second + (hidden @ p["w3"].T)[:, 0] + p["b3"]
    label = label_B1[:, 0]
    return (jax.nn.softplus(logit) - label * logit).mean()


def adamw(w: Array, g: Array, m: Array, v: Array, t: Array) -> tuple[Array, Array, Array]:
    m = B1 * m + (1 - B1) * g
    v = B2 * v + (1 - B2) * g * g
    w = w * (1 - LR * WEIGHT_DECAY) - LR / (1 - B1**t) * m / (jnp.sqrt(v / (1 - B2**t)) + EPS)
    return w, m, v


# --- from files ------------------------------------------------------------------------------------------------------


def train_from_files(
    paths: Sequence[str],
    batch_size: int = 1000,
    *,
    epochs: int = 4,
    log2_rows: int = 20,
    weights: dict[str, np.ndarray],
    loss: Callable[..., Array],
) -> dict[str, float]:
    """The end-to-end opponent: ORC files to trained weights, with decoding in a separate thread.

    Ids are hashed into 2^log2_rows rows (with collisions, the cheapest remapping); lists of length 0 or 1
    become padded arrays without a Python loop. The first epoch compiles and warms the page cache; it is not timed.

    Args:     weights: workload.init_weights(2**log2_rows) as numpy arrays.
              loss: `loss_fn`, or `textbook_loss`.
    Returns:  samples_per_s over `epochs` timed epochs, the same without training (decode_per_s), samples, loss.
    Raises:   RuntimeError when a batch had more distinct rows than the compiled step has room for.
    """
    max_distinct = batch_size * NUM_COLUMNS // 2
    baseline = compiled(weights, max_distinct=max_distinct, loss=loss)
    for batch in prefetched(batches(paths, batch_size, log2_rows)):
        last = baseline.step(batch)
    jax.block_until_ready(last)

    start, samples = time.perf_counter(), 0
    for batch in prefetched(batches(list(paths) * epochs, batch_size, log2_rows)):
        last = baseline.step(batch)
        samples += batch_size
    jax.block_until_ready(last)
    train_s = time.perf_counter() - start
    if baseline.max_distinct() > max_distinct:
        raise RuntimeError(f"max_distinct: got {baseline.max_distinct()} rows in a batch, expected <= {max_distinct}.")

    start = time.perf_counter()
    decoded = sum(len(b.num) for b in batches(list(paths) * epochs, batch_size, log2_rows))
    decode_s = time.perf_counter() - start
    return {
        "samples_per_s": samples / train_s,
        "decode_per_s": decoded / decode_s,
        "samples": samples,
        "loss": float(last),
    }


def batches(paths: Sequence[str], batch_size: int, log2_rows: int) -> Iterator[Batch]:
    """Batches cut across files; the last, incomplete one is dropped."""
    rest: Batch | None = None
    for path in paths:
        rows = decode(path, log2_rows)
        if rest is not None and len(rest.num):
            rows = Batch(
                np.concatenate([rest.row, rows.row], 1),
                *(np.concatenate(pair) for pair in zip(rest[1:], rows[1:], strict=True)),
            )
        end = len(rows.num) // batch_size * batch_size
        for i in range(0, end, batch_size):
            yield cut(rows, slice(i, i + batch_size))
        rest = cut(rows, slice(end, None))


def cut(rows: Batch, part: slice) -> Batch:
    return Batch(np.ascontiguousarray(rows.row[:, part]), rows.num[part], rows.label[part])


def decode(path: str, log2_rows: int) -> Batch:
    """One ORC file as padded arrays, ids hashed to rows."""
    table = orc.read_table(path)
    num_rows = len(table)

    def lists(name: str) -> tuple[np.ndarray, np.ndarray]:
        column = table[name].combine_chunks()
        return column.values.to_numpy(), np.diff(column.offsets.to_numpy()).astype(bool)

    index = np.full((NUM_COLUMNS, num_rows), 1 << log2_rows, np.int32)
    for f in range(NUM_COLUMNS):
        ids, present = lists(f"c{f + 1}")
        hashed = (ids.view(np.uint64) + np.uint64(f << 40)) * np.uint64(0x9E3779B97F4A7C15)
        index[f, present] = (hashed >> np.uint64(64 - log2_rows)).astype(np.int32)
    num = np.zeros((num_rows, NUM_NUMERICS), np.float32)
    for f in range(NUM_NUMERICS):
        values, present = lists(f"i{f + 1}")
        num[present, f] = np.log1p(np.maximum(values, 0).astype(np.float32))
    label = lists("label")[0].astype(np.float32)[:, None]
    return Batch(index, num, label)


def prefetched(source: Iterator[Batch], depth: int = 16) -> Iterator[Batch]:
    """Runs `source` in a thread, `depth` batches ahead; an error there is raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)

    def fill() -> None:
        try:
            for batch in source:
                ready.put(batch)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


LOSSES = {"jax": loss_fn, "jax_textbook": textbook_loss}

# --- in a child process: see harness.Child ---------------------------------------------------------------------------


def child_backend() -> str:
    """Where JAX computes: "cpu", "gpu". For harness.call_in_child."""
    return jax.default_backend()


def child_loop(
    variant: str, num_batches: int, batch_size: int, table_rows: int, seed: int
) -> tuple[Callable[[int], Any], Callable[[Any], Any]]:
    """(run k-th step, wait for its result) of "jax" or "jax_textbook", for harness.Child."""
    from bench.workload import init_weights, make_batches

    work = make_batches(num_batches, batch_size, table_rows=table_rows, seed=seed)
    weights = {name: w.numpy() for name, w in init_weights(table_rows, seed=seed).items()}
    baseline = compiled(
        weights,
        max_distinct=max(work.num_distinct) + 1,
        loss=LOSSES[variant],
    )
    dense = [jax.device_put(Batch(d.row.numpy().astype(np.int32), d.num.numpy(), d.label.numpy())) for d in work.dense]
    return (lambda k: baseline.step(dense[k % len(dense)])), jax.block_until_ready


def child_losses(
    variant: str, weights: dict[str, np.ndarray], batches: Sequence[tuple], max_distinct: int
) -> tuple[list[float], dict[str, np.ndarray], int]:
    """Losses of the batches, the weights after them and the most distinct rows, for harness.call_in_child."""
    baseline = compiled(weights, max_distinct=max_distinct, loss=LOSSES[variant])
    return [float(baseline.step(Batch(*b))) for b in batches], baseline.weights(), baseline.max_distinct()


def child_train_from_files(variant: str, paths: Sequence[str], batch_size: int, epochs: int) -> dict[str, float]:
    """train_from_files of "jax" or "jax_textbook" with its own first weights, for harness.call_in_child."""
    from bench.workload import init_weights

    weights = {name: w.numpy() for name, w in init_weights(1 << 20).items()}
    return train_from_files(paths, batch_size, epochs=epochs, weights=weights, loss=LOSSES[variant])
