"""A script: ranks read their streams of the Criteo sample, and each prints what it read, in JSON.

Arguments: the files, the number of streams, and the number of a stream's rows in a whole batch.
"""

import json
import sys

import torch

from recfx.data import fixedlen, reader, varlen
from recfx.dist import join
from recfx.dist.streams import deal
from recfx.types import NUM_SAMPLES

STOP_AT = 3  # whole batches before the run stops and goes on


def columns():
    """Labels, and two features: one of numbers, one of ids."""
    return [fixedlen("label", [0.0]), varlen("i1", torch.float32), varlen("c1", torch.int64)]


def rows(batch):
    """The rows of a batch, as JSON."""
    num, found = int(batch[NUM_SAMPLES]), [batch["label"].flatten().tolist()]
    for name in ("i1", "c1"):
        values, offsets = batch[name].values.tolist(), batch[name].offsets.tolist()
        found.append([values[offsets[k] : offsets[k + 1]] for k in range(num)])
    return [list(row) for row in zip(found[0][:num], *found[1:], strict=True)]


def main(paths, streams, per_stream):
    group = join(streams=streams)
    dealt = deal(reader(paths, columns(), streams * per_stream, drop_remainder=False), group)
    iterator = dealt.epoch(0)
    batches = [next(iterator) for _ in range(STOP_AT)]
    position = iterator.position
    iterator.close()
    batches += list(dealt.start_at(json.loads(json.dumps(position))))
    forms = [sorted((*key, str(form)) for key, form in b.layout.forms.items()) for b in batches]
    print(json.dumps({"rows": [rows(b) for b in batches], "forms": forms, "by_row": dealt.by_row}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
