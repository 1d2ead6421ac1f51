"""The models as textbooks write them: plain modules with loops over fields and pairs.

Each holds its parameters under the names that `recfx.models` gives them, so that gradients can be compared by name.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class Reference(nn.Module):
    """Parameters by name; `forward(emb, feats)` gives the logit."""

    def __init__(self, params):
        super().__init__()
        self.names = {name: name.replace(".", "_") for name in params}
        self.by_name = nn.ParameterDict({self.names[name]: nn.Parameter(p.clone()) for name, p in params.items()})

    def __getitem__(self, name):
        return self.by_name[self.names[name]]

    def __contains__(self, name):
        return name in self.names

    def grads(self):
        return {name: self[name].grad for name in self.names}

    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"].T, self[f"{name}.bias"])

    def mlp(self, name, x, *, last=None):
        num = sum(key.startswith(f"{name}.") and key.endswith(".weight") and key.count(".") == name.count(".") + 2
                  for key in self.names)  # fmt: skip
        for i in range(num):
            x = self.linear(f"{name}.{i}", x)
            if i < num - 1:
                if f"{name}.{i}.layer_norm.scale" in self:
                    x = self.layer_norm(f"{name}.{i}.layer_norm", x)
                x = F.relu(x)
        return x

    def layer_norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self[f"{name}.scale"]
            + self[f"{name}.shift"]
        )

    def fields(self, emb, feats):
        own = [emb["emb"][:, f] for f in range(emb["emb"].shape[1])]
        if "numeric_emb" in self:
            own += [feats["numeric"][:, n, None] * self["numeric_emb"][n] for n in range(len(self["numeric_emb"]))]
        return own

    def first(self, emb, feats):
        total = sum(emb["bias"][:, f] for f in range(emb["bias"].shape[1]))
        if "numeric_bias" in self:
            total = total + sum(
                feats["numeric"][:, n, None] * self["numeric_bias"][n] for n in range(len(self["numeric_bias"]))
            )
        return total

    def flat(self, emb, feats):
        parts = [emb["emb"][:, f] for f in range(emb["emb"].shape[1])]
        return torch.cat([*parts, *([feats["numeric"]] if "numeric" in feats else [])], dim=1)

    def gate(self, name, x):
        if f"{name}.context" not in self:
            return x
        return x * 2 / (1 + torch.exp(-self.mlp(name, self[f"{name}.context"])))


class LR(Reference):
    def forward(self, emb, feats):
        return self.first(emb, feats) + self["bias"]


class FM(Reference):
    def forward(self, emb, feats):
        pairs = itertools.combinations(self.fields(emb, feats), 2)
        return self["bias"] + self.first(emb, feats) + sum((a * b).sum(1, keepdim=True) for a, b in pairs)


class FwFM(Reference):
    def forward(self, emb, feats):
        logit = self["bias"] + self.first(emb, feats)
        for (f, a), (g, b) in itertools.combinations(enumerate(self.fields(emb, feats)), 2):
            logit = logit + self["pairs"][f, g] * (a * b).sum(1, keepdim=True)
        return logit


class DeepFM(Reference):
    """Numeric embeddings enter the MLP unscaled, before the others."""

    def forward(self, emb, feats):
        fm = sum((a * b).sum(1, keepdim=True) for a, b in itertools.combinations(self.fields(emb, feats), 2))
        x = emb["emb"].flatten(1)
        if "numeric_emb" in self:
            x = torch.cat([self["numeric_emb"].flatten().expand(len(x), -1), x], dim=1)
        return self.first(emb, feats) + fm + self.mlp("dnn", x)


class WideDeep(Reference):
    def forward(self, emb, feats):
        return self.first(emb, feats) + self.mlp("dnn", self.flat(emb, feats))


class DCNv2(Reference):
    def forward(self, emb, feats):
        x0 = x = self.flat(emb, feats)
        for i in range(sum(name.startswith("cross.") and name.endswith(".bias") for name in self.names)):
            name = f"cross.{i}"
            if f"{name}.weight" in self:
                inner = F.linear(x, self[f"{name}.weight"].T)
            else:
                gate, inner = F.softmax(x @ self[f"{name}.gate"], dim=1), 0
                for e in range(len(self[f"{name}.down"])):
                    down = torch.tanh(x @ self[f"{name}.down"][e])
                    inner = inner + gate[:, e, None] * (
                        torch.tanh(down @ self[f"{name}.inner"][e]) @ self[f"{name}.up"][e]
                    )
            x = x0 * (inner + self[f"{name}.bias"]) + x
        if "dnn.0.weight" in self:
            x = torch.cat([x, F.relu(self.mlp("dnn", x0))], dim=1)
        return self.linear("out", x)


class DLRM(Reference):
    def forward(self, emb, feats):
        fields = [emb["emb"][:, f] for f in range(emb["emb"].shape[1])]
        parts = []
        if "bottom.0.weight" in self:
            parts = [F.relu(self.mlp("bottom", feats["numeric"]))]
            fields = [*parts, *fields]
        for f in range(len(fields)):
            parts += [(fields[f] * fields[g]).sum(1, keepdim=True) for g in range(f)]
        return self.mlp("top", torch.cat(parts, dim=1))


class AutoInt(Reference):
    def forward(self, emb, feats):
        fields = self.fields(emb, feats)
        flat = torch.cat(fields, dim=1)
        i = 0
        while f"attention.{i}.query" in self:
            query, key, value = (self[f"attention.{i}.{part}"] for part in ("query", "key", "value"))
            new = []
            for f in fields:
                heads = []
                for h in range(query.shape[1]):
                    scores = [((f @ query[:, h]) * (g @ key[:, h])).sum(1, keepdim=True) for g in fields]
                    weights = F.softmax(torch.cat(scores, dim=1), dim=1)
                    heads.append(sum(weights[:, k, None] * (g @ value[:, h]) for k, g in enumerate(fields)))
                new.append(F.relu(torch.cat(heads, dim=1) + f @ self[f"attention.{i}.residual"]))
            fields, i = new, i + 1
        logit = self.linear("out", torch.cat(fields, dim=1))
        return logit + self.mlp("dnn", flat) if "dnn.0.weight" in self else logit


class MaskNet(Reference):
    def forward(self, emb, feats):
        fields = self.fields(emb, feats)
        v, x = torch.cat(fields, dim=1), torch.cat([self.layer_norm("norm", f) for f in fields], dim=1)
        outs, is_serial = [], "out.0.weight" in self
        for i in range(sum(name.endswith(".dense.weight") for name in self.names)):
            masked = self.mlp(f"block.{i}.mask", v) * (outs[-1] if is_serial and outs else x)
            outs.append(F.relu(self.layer_norm(f"block.{i}.norm", self.linear(f"block.{i}.dense", masked))))
        return self.mlp("out", outs[-1]) if is_serial else self.mlp("dnn", torch.cat(outs, dim=1))


class FinalMLP(Reference):
    def forward(self, emb, feats):
        x = self.flat(emb, feats)
        first, second = (F.relu(self.mlp(name, self.gate(f"gate.{name}", x))) for name in ("first", "second"))
        logit = self["bias"] + first @ self["fuse.first"] + second @ self["fuse.second"]
        heads = self["fuse.bilinear"]
        for a, w, b in zip(first.chunk(len(heads), 1), heads, second.chunk(len(heads), 1), strict=True):
            logit = logit + torch.stack([u @ w @ v for u, v in zip(a, b, strict=True)])[:, None]
        return logit


class FinalNet(Reference):
    def forward(self, emb, feats):
        logits = []
        for k in itertools.takewhile(lambda k: f"out.{k}.weight" in self, itertools.count()):
            x = self.gate(f"gate.{k}", self.flat(emb, feats))
            for i in range(sum(n.startswith(f"block.{k}.") and n.endswith(".weight") for n in self.names)):
                both = self.linear(f"block.{k}.{i}", x)
                half = both.shape[1] // 2
                x = both[:, half:] * (1 + both[:, :half])
                if f"block.{k}.{i}.layer_norm.scale" in self:
                    x = self.layer_norm(f"block.{k}.{i}.layer_norm", x)
                x = F.relu(x)
            logits.append(self.linear(f"out.{k}", x))
        return sum(logits) / len(logits)


class SharedBottom(Reference):
    def forward(self, emb, feats):
        x = F.relu(self.mlp("shared", self.flat(emb, feats)))
        return {task: self.mlp(f"task.{task}", x) for task in ("click", "buy")}


class MMoE(Reference):
    def forward(self, emb, feats):
        x = self.flat(emb, feats)
        outs = {}
        for task in ("click", "buy"):
            gate = F.softmax(x @ self[f"gate.{task}"], dim=1)
            each = [F.relu(self.mlp(f"expert.{e}", x)) for e in range(gate.shape[1])]
            outs[task] = self.mlp(f"task.{task}", sum(gate[:, e, None] * out for e, out in enumerate(each)))
        return outs


class PLE(Reference):
    def forward(self, emb, feats):
        x = self.flat(emb, feats)
        inputs = {"click": x, "buy": x, "shared": x}
        for level in range(2):
            found = {of: [F.relu(self.mlp(f"level.{level}.{of}.{e}", inputs[of])) for e in range(2)] for of in inputs}
            new = {}
            for of in inputs:
                if f"level.{level}.gate.{of}" in self:
                    own = [*itertools.chain(*found.values())] if of == "shared" else found[of] + found["shared"]
                    gate = F.softmax(inputs[of] @ self[f"level.{level}.gate.{of}"], dim=1)
                    new[of] = sum(gate[:, e, None] * out for e, out in enumerate(own))
            inputs = new
        return {task: self.mlp(f"task.{task}", inputs[task]) for task in ("click", "buy")}


class ESMM(Reference):
    def forward(self, emb, feats):
        x = self.flat(emb, feats)
        click, after = self.mlp("click", x), self.mlp("after_click", x)
        p = torch.sigmoid(click) * torch.sigmoid(after)
        return {"click": click, "buy": torch.log(p / (1 - p))}


class DIN(Reference):
    """One sample after another; Dice in training needs the mean and variance over all items of all histories."""

    def forward(self, emb, feats, stats=None):
        rows, offsets, target = emb["history"].values, emb["history"].offsets.tolist(), emb["target"][:, 0]
        owners = [b for b, (i, j) in enumerate(itertools.pairwise(offsets)) for _ in range(j - i)]
        pairs = [torch.cat([h, target[b], h - target[b], h * target[b]]) for h, b in zip(rows, owners, strict=False)]
        hidden = self.linear("attention.0", torch.stack(pairs))
        if "attention.0.slope" in self:
            hidden = torch.stack([torch.where(h > 0, h, h * self["attention.0.slope"]) for h in hidden])
        else:
            mean, var = stats or (hidden.mean(0), hidden.var(0, unbiased=False))
            share = torch.sigmoid((hidden - mean) / (var + 1e-8).sqrt())
            hidden = share * hidden + (1 - share) * self["attention.0.dice.slope"] * hidden
        weights = self.linear("attention.1", hidden)
        users = [(weights[i:j] * rows[i:j]).sum(0) for i, j in itertools.pairwise(offsets)]
        others = [emb["emb"].flatten(1), feats["numeric"]] if "emb" in emb else []
        return self.mlp("dnn", torch.cat([target, torch.stack(users), *others], dim=1))


class SASRec(Reference):
    """One sample after another, on its own list of items, without padding."""

    def forward(self, emb, feats):
        rows, offsets, target = emb["history"].values, emb["history"].offsets.tolist(), emb["target"][:, 0]
        logits = []
        for b, (i, j) in enumerate(itertools.pairwise(offsets)):
            items = rows[i:j][-len(self["positions"]) :]
            if len(items) == 0:
                logits.append(target.new_zeros(1))
                continue
            x = items * items.shape[1] ** 0.5 + self["positions"][: len(items)]
            for k in range(2):
                x = x + self.attention(f"layer.{k}", self.layer_norm(f"layer.{k}.attention.layer_norm", x))
                inner = F.relu(self.linear(f"layer.{k}.up", self.layer_norm(f"layer.{k}.up.layer_norm", x)))
                x = x + self.linear(f"layer.{k}.down", inner)
            logits.append((self.layer_norm("last.layer_norm", x)[-1] * target[b]).sum()[None])
        return torch.stack(logits)

    def attention(self, name, x):
        query, key, value = (self[f"{name}.attention.{part}"] for part in ("query", "key", "value"))
        heads = []
        for h in range(query.shape[1]):
            scores = (x @ query[:, h]) @ (x @ key[:, h]).T / query.shape[2] ** 0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            heads.append(F.softmax(scores, dim=1) @ (x @ value[:, h]))
        return self.linear(f"{name}.out", torch.cat(heads, dim=1))


class TwoTower(Reference):
    def forward(self, emb, feats):
        query = self.mlp("query", torch.cat([emb["query"].flatten(1), feats["numeric"]], dim=1))
        item = self.mlp("item", emb["item"].flatten(1))
        return {"query": query / query.norm(dim=1, keepdim=True), "item": item / item.norm(dim=1, keepdim=True)}
