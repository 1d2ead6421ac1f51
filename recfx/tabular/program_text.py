"""The text of a program: a short file of the public API, which a user edits from there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from recfx.tabular.columns import Roles
from recfx.tabular.models import Model, model_for

__all__ = ["program_text"]


def program_text(
    roles: Roles,
    *,
    model: str,
    negative_rate: float = 1.0,
    format: str | None = None,
    rate_factor: bool = False,
    arguments: dict | None = None,
) -> str:
    """A program with `build(args)`, see `recfx.program`.

    Args:     model: one of `recfx.tabular.MODELS`.
              negative_rate: the share of negatives that the training files kept: evaluation and scores add its
              logarithm to the logit.
              format: of the files, as an expression of Python; None: by their names.
              rate_factor: of `recfx.step.train_step`.
              arguments: of the program and their defaults.
    """
    labels = roles.named("label")
    chosen = model_for(model, len(labels))
    given = {"batch_size": 1024, "dim": 8, "sparse_lr": 1e-3, "dense_lr": 1e-3, "accumulation": 1, "seed": 42}
    if negative_rate != 1:
        given["negative_rate"] = negative_rate
    parts = [
        f'"""{chosen.config.removesuffix("Config")} for {_joined(labels)}, written by `recfx train`. Edit it, and train'
        ' again:\n\n    recfx train FILES --program program.py --output_dir run2\n"""',
        _imports(roles, chosen, negative_rate, format),
        f"ARGUMENTS = {_literal(given | (arguments or {}))}",
        *(f"{name} = {_literal(names)}" for name, names in _names(roles).items()),
        _columns(roles),
        _features(roles),
        _build(roles, chosen, negative_rate, format, rate_factor),
    ]
    return "\n\n".join(parts[:2]) + "\n\n" + "\n".join(parts[2:-2]) + "\n\n\n" + "\n\n\n".join(parts[-2:]) + "\n"


def _names(roles: Roles) -> dict[str, list[str]]:
    """The constants of the program that are names of columns."""
    found = {
        "LABELS": roles.named("label"),
        "WEIGHT": roles.named("weight"),
        "DENSE": roles.named("dense"),
        "IDS": roles.named("sparse"),
        "TEXTS": roles.named("text"),
        "FLAGS": roles.named("bool"),
        "LISTS": [c.name for c in roles.columns if c.name in roles.ids and c.is_list],
    }
    return {name: names for name, names in found.items() if names}


def _imports(roles: Roles, model: Model, negative_rate: float, format: str | None) -> str:
    data = ["OneOf", "fixedlen", "reader"]
    data += ["Csv"] if format and format.startswith("Csv(") else []
    data += ["hashed"] if roles.named("text") else []
    data += ["varlen"] if roles.named("dense", "sparse", "bool") else []
    several = len(roles.named("label")) > 1
    lines = [
        "from recfx import features as ops" if roles.named("dense") else None,
        f"from recfx.data import {', '.join(sorted(data))}",
        "from recfx.embeddings import Embedding" if roles.ids else None,
        "from recfx.kernels.lists.string_hash import farm_hashes" if roles.named("text") else None,
        f"from recfx.models import {model.module}",
        "from recfx.optim import adamw, sparse_adamw",
        "from recfx.program import Program",
        f"from recfx.step import {'Task, ' if several else ''}train_step",
    ]
    head = ["import math\n"] if negative_rate != 1 else []
    return "\n".join([*head, "import torch\n", *(line for line in lines if line)])


def _columns(roles: Roles) -> str:
    empty = 'null="empty"'
    lines = ["*(fixedlen(name, [0.0], valid=OneOf(0, 1)) for name in LABELS),"]
    if roles.named("weight"):
        lines.append("*(fixedlen(name, [1.0]) for name in WEIGHT),")
    if roles.named("dense"):
        lines.append(f'*(varlen(name, torch.float32, valid=None, {empty}, rounding="allow") for name in DENSE),')
    if roles.named("sparse"):
        lines.append(f"*(varlen(name, torch.int64, {empty}) for name in IDS),")
    if roles.named("text"):
        lines.append(f"*(hashed(name, farm_hashes, {empty}) for name in TEXTS),")
    if roles.named("bool"):
        lines.append(f"*(varlen(name, torch.float32, {empty}) for name in FLAGS),")
    return "\n".join(["COLUMNS = [", *(f"    {line}" for line in lines), "]"])


def _features(roles: Roles) -> str:
    names = ["LABELS", *(["WEIGHT"] if roles.named("weight") else [])]
    ids = [*(["IDS"] if roles.named("sparse") else []), *(["TEXTS"] if roles.named("text") else [])]
    feats = f"{{name: batch[name] for name in [{', '.join(f'*{name}' for name in names + ids)}]}}"
    lines = ["def features(batch):", f"    feats = {feats}"]
    if roles.named("bool"):
        lines += ["    for name in FLAGS:",
                  "        feats[name] = batch[name]._replace(values=batch[name].values.long())"]  # fmt: skip
    if roles.named("dense"):
        lines += [
            "    numbers, missing = ops.fill_missing([batch[name] for name in DENSE], 0.0)",
            '    feats["numeric"] = torch.cat([ops.signed_log1p(numbers), missing], dim=1)',
        ]
    return "\n".join([*lines, "    return feats"])


def _build(roles: Roles, model: Model, negative_rate: float, format: str | None, rate_factor: bool) -> str:
    several, weight = len(roles.named("label")) > 1, roles.named("weight")
    sparse = " + ".join(n for n in ("IDS", "TEXTS", "FLAGS") if n in _names(roles))
    has_lists = "LISTS" in _names(roles)
    lines = ["def build(args):"]
    config = [f"num_numeric={'2 * len(DENSE)' if roles.named('dense') else 0}"]
    config += [f"num_sparse={f'len({sparse})' if sparse else 0}"] if model.takes_number else []
    config += ["dim=args.dim"] if model.takes_width else []
    config += ["tasks=tuple(LABELS)"] if several else []
    made = f"{model.module}.{model.config}"
    in_one = f"    config = {made}({', '.join(config)})"
    lines += [in_one] if len(in_one) <= 110 else [f"    config = {made}(", *(f"        {c}," for c in config), "    )"]
    if sparse:
        pooled = ', combiner="mean" if name in LISTS else "sum"' if has_lists else ""
        lines += ["",
                  "    def embeddings(dim):",
                  f"        return [Embedding(name, dim=dim{pooled}) for name in {sparse}]"]  # fmt: skip
    groups = [f'"emb": embeddings({"args.dim"})'] if model.has_fields and sparse else []
    groups += ['"bias": embeddings(1)'] if model.has_bias and sparse else []
    if negative_rate != 1:
        lines += _corrected(model, several)
    tasks = ["LABELS[0]"]
    lines += [
        "",
        "    step = train_step(",
        "        features=features,",
        f"        embeddings={{{', '.join(groups)}}},",
    ]
    lines.append(f"        forward={'forward' if negative_rate != 1 else f'{model.module}.forward'},")
    of_weight = ", sample_weight=WEIGHT[0]" if weight else ""
    if several:
        lines.append(f"        tasks={{name: Task(label=name{of_weight}) for name in LABELS}},")
    else:
        lines.append(f"        label={tasks[0]},")
        lines += ["        sample_weight=WEIGHT[0],"] if weight else []
    of_format = f", format={format}" if format else ""
    return "\n".join([
        *lines,
        "        sparse_optimizer=sparse_adamw(args.sparse_lr),",
        "        dense_optimizer=adamw(args.dense_lr),",
        "        accumulation=args.accumulation,",
        "        seed=args.seed,",
        *(["        rate_factor=True,  # for --reduce_after"] if rate_factor else []),
        "    )",
        "    return Program(",
        "        step=step,",
        f"        init=lambda: step.init({model.module}.init(config, torch.Generator().manual_seed(args.seed))),",
        "        columns=COLUMNS,",
        f"        reader=lambda paths, use: reader(paths, COLUMNS, args.batch_size{of_format}),",
        "    )",
    ])  # fmt: skip


def _corrected(model: Model, several: bool) -> list[str]:
    """A forward that adds the logarithm of the rate outside training."""
    given = f"{model.module}.forward(params, emb, feats)"
    shift = "math.log(args.negative_rate)"
    moved = f"{{name: logit + {shift} for name, logit in logits.items()}}" if several else f"logits + {shift}"
    return [
        "",
        "    def forward(params, emb, feats, context):",
        "        # The files kept a share of the negatives: in all data the odds are so many times as large.",
        f"        logits = {given}",
        f"        return logits if context.training else {moved}",
    ]


def _joined(names: Sequence[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def _literal(value: list[str] | dict[str, Any]) -> str:
    """A list of names or a dict of numbers, on as many lines as it needs."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= 100:
        return text
    if isinstance(value, dict):
        return "\n".join(["{", *(f"    {json.dumps(name)}: {json.dumps(of)}," for name, of in value.items()), "}"])
    lines = [""]
    for item in value:
        part = f"{json.dumps(item, ensure_ascii=False)}, "
        if len(lines[-1]) + len(part) > 110:
            lines.append("")
        lines[-1] += part
    return "\n".join(["[", *(f"    {line.rstrip()}" for line in lines), "]"])
