"""The training step: read -> insert -> pool -> forward and backward -> sum row gradients -> optimisers -> metrics.

update.py     `update_`, one micro-batch in about thirty lines, and the pure `update`
forward.py    features -> rows -> logit and loss; evaluation and prediction
finite.py     what a step does about NaN and infinity
state.py      what a step changes (`TrainState`), what it returns (`Aux`), its functions (`Step`)
parts.py      what is fixed when a step is built, with the task that it trains for
builder.py    `train_step`: from a user's functions to a `Step`
checks.py     errors for a user's arguments, batches and functions
"""

from recfx.step.builder import train_step
from recfx.step.parts import Task
from recfx.step.state import Aux, NonFinite, OnNonFinite, Precision, Step, TrainState, Window

__all__ = ["Aux", "NonFinite", "OnNonFinite", "Precision", "Step", "Task", "TrainState", "Window", "train_step"]
