"""The frame of a program: a module that builds a step and a reader, and the record that a run of it leaves.

A program is a module with a function `build`, and `ARGUMENTS`, the defaults of its arguments, where it has any:

    ARGUMENTS = {"lr": 1e-3, "batch_size": 1000}

    def build(args):
        step = train_step(..., sparse_optimizer=sparse_adamw(args.lr))
        return Program(
            step=step,
            init=lambda: step.init(first_params()),
            columns=COLUMNS,
            reader=lambda paths, use: reader(paths, COLUMNS, args.batch_size, drop_remainder=use == "train"),
        )

`train` runs it and writes `run.json` next to the checkpoints. A checkpoint does not contain the feature function or the
model; `load` rebuilds them from `run.json` and the program, and rejects a program whose source has changed. `evaluate`
and whatever else reads a run start from there. A separate loop does not need this: `recfx.train.train` and
`recfx.train.evaluate` take a step, a state and a reader.
"""

from recfx.program.definition import Program, Use, build
from recfx.program.record import differences, read_run
from recfx.program.running import evaluate, load, restore, train

__all__ = ["Program", "Use", "build", "differences", "evaluate", "load", "read_run", "restore", "train"]
