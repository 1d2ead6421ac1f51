"""A script: ranks train one model on their shares of known batches, and rank 0 writes what all of them hold.

Arguments: the file to write, and a list of cases in JSON, each a dict of options of `trained`.
"""

import hashlib
import json
import pickle
import sys
import time

import numpy as np
import torch
from torch import distributed
from torch.utils._pytree import tree_leaves

from recfx import dist
from recfx.capture import capture, capture_evaluation, capture_prediction, capture_steps
from recfx.embeddings import Embedding, truncated_normal
from recfx.optim import adamw, clip_global_norm, sparse_adamw, sparse_rowwise_adagrad
from recfx.ragged import segment_softmax, segment_sum
from recfx.step import Task, train_step
from recfx.table.policies import Life, at_least
from recfx.types import NUM_SAMPLES, Ragged, pack

IDS = ("a", "b", "c", "read")
BATCH_SIZE, STREAMS = 24, 4
INIT = truncated_normal(0.3)
SHARED = {"dim": 4, "init": INIT, "shared_name": "s", "unknown": "zeros"}


def batches(num, seed=0):
    """Whole batches of numpy columns; the last is short. Ids are skewed, and new ones come all the time."""
    rng, found = np.random.default_rng(seed), []
    for k in range(num):
        n = BATCH_SIZE - 5 * (k == num - 1)
        columns = {"label": rng.integers(0, 2, (n, 1)).astype(np.float32), "x": rng.normal(size=(n, 2)).astype("f4")}
        for name in IDS:
            ends = np.r_[0, np.cumsum(rng.integers(0, 4, n))].astype(np.int32)
            columns[name] = (rng.zipf(1.3, ends[-1]) % (50 + 10 * k)).astype(np.int64), ends
        found.append(columns)
    return found


def share(columns, first, last, size):
    """Samples first to last of a whole batch, in a batch of `size` places."""
    first, last = (min(k, len(columns["label"])) for k in (first, last))
    cut = {NUM_SAMPLES: torch.tensor(last - first, dtype=torch.int32)}
    for name in ("label", "x"):
        cut[name] = torch.zeros(size, columns[name].shape[1])
        cut[name][: last - first] = torch.from_numpy(columns[name][first:last])
    for name in IDS:
        values, ends = columns[name]
        of_share = torch.zeros(4 * size, dtype=torch.int64)
        of_share[: ends[last] - ends[first]] = torch.from_numpy(values[ends[first] : ends[last]].copy())
        offsets = torch.full((size + 1,), int(ends[last] - ends[first]), dtype=torch.int32)
        offsets[: last - first + 1] = torch.from_numpy(ends[first : last + 1] - ends[first])
        cut[name] = Ragged(of_share, offsets)
    return pack(cut)


def forward(params, emb, feats, context):
    pairs = torch.tanh(emb["emb"][:, 0]) * emb["emb"][:, 1]
    pairs = context.dropout(pairs, 0.2, "pairs")
    logit = (
        emb["emb"].flatten(1) @ params["w"] + emb["bias"].sum(1) + feats["x"] @ params["v"] + pairs.sum(1, keepdim=True)
    )
    if "kept" not in emb:
        return logit
    rows, offsets = emb["kept"].values, emb["kept"].offsets
    weights = segment_softmax(rows.sum(1, keepdim=True), offsets)
    return {"one": logit + segment_sum(weights * rows, offsets).sum(1, keepdim=True), "two": logit * 0.5}


def built(group, *, optimizer="adamw", accumulation=3, clip=False, admit=0, kept=False, **options):
    sparse = {"adamw": sparse_adamw, "adagrad": sparse_rowwise_adagrad}[optimizer](1e-2)
    life = Life(admit=at_least(admit), candidates=4096, every=10**6) if admit else None
    step = train_step(
        features=lambda batch: {**batch},
        embeddings={
            "emb": [
                Embedding("a", **SHARED),
                Embedding("b", trainable=False, **SHARED),
                Embedding("c", **SHARED),
                Embedding("read", read_only=True, **SHARED),
            ],
            "bias": [Embedding(name, dim=1, init=INIT) for name in IDS[:3]],
            **({"kept": [Embedding("a", combiner=None, **SHARED)]} if kept else {}),
        },
        tasks={name: Task(label="label", weight=w) for name, w in (("one", 1.0), ("two", 0.3))} if kept else None,
        forward=forward,
        sparse_optimizer=sparse,
        dense_optimizer=adamw(1e-2),
        accumulation=accumulation,
        clip=clip_global_norm(0.05) if clip else None,
        life=life,
        max_rows=4096,
        group=group,
        **options,
    )
    generator = torch.Generator().manual_seed(0 if group is None else group.rank)  # rank 0's are everybody's
    return step, step.init({name: torch.randn(n, 1, generator=generator) for name, n in (("w", 16), ("v", 2))})


def shares(group, columns):
    """What this rank is given of a whole batch: one batch, or one for each round."""
    if group is None:
        return [share(columns, 0, BATCH_SIZE, BATCH_SIZE)]
    if not group.deterministic:
        size = BATCH_SIZE // group.world_size
        return [share(columns, group.rank * size, (group.rank + 1) * size, size)]
    size = BATCH_SIZE // STREAMS
    streams = [k * group.world_size + group.rank for k in range(group.rounds)]
    return [
        share(columns, s * size, (s + 1) * size, size) if s < STREAMS else share(columns, 0, 0, size) for s in streams
    ]


def two_at_a_time(group, step, state, whole):
    """The state, and the losses, after calls of two batches each; the last is of one."""
    todo = [mine for columns in whole for mine in shares(group, columns)]
    call, losses = capture_steps(step, state, todo[0], steps_per_replay=2, backend="eager"), []
    for k in range(0, len(todo), 2):
        state, auxes = call(state, todo[k : k + 2])
        losses += [float(aux.loss) for aux in auxes]
    return state, losses


def trained(group, *, num=9, run="eager", shrink=False, nan=False, **options):
    """Trains, evaluates and predicts; what this rank holds then."""
    step, state = built(group, **options)
    whole = batches(num)
    if nan:
        whole[4]["x"][15] = np.nan
    first = shares(group, whole[0])[0]
    call = {
        "eager": lambda: capture(step, state, first, backend="eager"),
        "inductor": lambda: capture(step, state, first),
    }
    call = call[run]() if run in call else getattr(step, run, None)
    losses, num_repeated = [], 0
    if run == "two at a time":
        state, losses = two_at_a_time(group, step, state, whole)
    for k, columns in enumerate([] if losses else whole):
        for mine in shares(group, columns):
            if shrink and k % 2 and step.exchange is not None:
                step.exchange.capacities = [2] * len(step.exchange.capacities)
            state, aux = call(state, mine)
            num_repeated += bool(shrink and k % 2 and step.exchange and min(step.exchange.capacities) > 2)
            losses.append(float(aux.loss))
    state = step.flush_(state)
    counts = [t.clone() for t in tree_leaves(state.metrics)]
    logits = []
    evaluate, predict = (make(step, state, first, backend="eager") for make in (capture_evaluation, capture_prediction))
    for t in tree_leaves(state.metrics):
        t.zero_()
    for columns in batches(3, seed=1):
        for mine in shares(group, columns):
            state, _ = evaluate(state, mine)
            for logit in tree_leaves(predict(state, mine)):
                logits += logit[: int(mine[NUM_SAMPLES])].flatten().tolist()
    held_out = [t.clone() for t in tree_leaves(state.metrics)]
    if group is not None:
        for t in (*counts, *held_out):
            group.sum_(t)
    rows = []
    for table in state.tables:
        n = int(table.num_rows)
        columns = (table.vocabularies, table.ids, table.seen >> 32, table.born, table.counts)
        rows.append(list(zip(*(c[:n].tolist() for c in columns), table.rows[:n].numpy().copy(), strict=True)))
    return {
        "rows": rows,
        "params": {name: p.numpy().copy() for name, p in state.params.items()},
        "losses": losses,
        "step": int(state.step),
        "tally": [t.tally.numpy().copy() for t in state.tables],
        "counts": [t.numpy().copy() for t in counts],
        "held_out": [t.numpy().copy() for t in held_out],
        "nonfinite": [int(t) for t in state.nonfinite],
        "logits": logits,
        "num_repeated": num_repeated,
    }


def digest(of_ranks):
    """sha256 of all rows, by key, and of the parameters: what must not depend on the number of ranks."""
    hashed = hashlib.sha256()
    for t in range(len(of_ranks[0]["rows"])):
        rows = {tuple(row[:2]): row for one in of_ranks for row in one["rows"][t]}
        for key in sorted(rows):
            hashed.update(repr(rows[key][:5]).encode() + rows[key][5].tobytes())
    for name, p in sorted(of_ranks[0]["params"].items()):
        hashed.update(name.encode() + p.tobytes())
    return hashed.hexdigest()


def main(path, cases):
    results = []
    for case in json.loads(cases):
        group = dist.join(streams=STREAMS, deterministic=True) if case.pop("deterministic", False) else dist.join()
        results.append(group.gather(trained(group, **case)))
    if group.is_first:
        with open(path, "wb") as file:
            pickle.dump(results, file)
    if distributed.is_initialized():
        group.wait()
        distributed.destroy_process_group()
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
