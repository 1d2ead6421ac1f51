"""temporary"""

import torch
from recfx.kernels.index.owner import owner


def deal_ids_(message, first, id_P, cell_P, vocabularies, trains, capacity, distinct):
    n = message.shape[0]
    vocab = vocabularies[(cell_P % len(vocabularies)).long()]
    own = owner(id_P, vocab, n).tolist() if len(id_P) else []
    t = [1] * len(id_P) if trains is None else trains[(cell_P % len(trains)).long()].long().tolist()
    place = torch.full_like(cell_P, -1)
    counts = torch.zeros(n, 2, dtype=torch.int64)
    ids = torch.zeros(n, capacity, dtype=torch.int64)
    tags = torch.full((n, capacity), -1, dtype=torch.int32)
    seen = {}
    fill = [0] * n
    for k, (i, c, v) in enumerate(zip(id_P.tolist(), cell_P.tolist(), vocab.tolist())):
        if c < 0:
            continue
        o = own[k]
        counts[o, 1] += 1
        key = (v, i) if distinct else k
        if key not in seen:
            seen[key] = fill[o]
            fill[o] += 1
            if seen[key] < capacity:
                ids[o, seen[key]] = i
                tags[o, seen[key]] = v << 1
        p = seen[key]
        if p < capacity:
            place[k] = o * capacity + p
            if t[k]:
                tags[o, p] |= 1
    counts[:, 0] = torch.tensor(fill)
    message[:, first : first + capacity] = ids
    message[:, first + capacity : first + capacity + capacity // 2] = tags.view(torch.int64)
    return place, counts
