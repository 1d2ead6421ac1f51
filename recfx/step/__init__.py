"""The training step: read -> insert -> pool -> forward and backward -> sum row gradients -> optimisers -> metrics.

update.py     `update_`, one micro-batch in about thirty lines, and the pure `update`
forward.py    features -> rows -> logit and loss; evaluation and prediction
finite.py     what a step does about NaN and infinity
state.py      what a step changes (`TrainState`), what it returns (`Aux`), its functions (`Step`)
gradients.py  norms of a batch's gradients, by parameter and feature
parts.py      what is fixed when a step is built
tasks.py      what outputs are trained for: labels, losses, masks, what is counted (`Task`)
builder.py    `train_step`: from a user's functions to a `Step`
checks.py     errors for a user's arguments and batches; outputs.py for what `forward` and a loss return
"""

from recfx.step.builder import train_step
from recfx.step.state import Aux, NonFinite, OnNonFinite, Precision, Step, TrainState, Window
from recfx.step.tasks import Task

__all__ = ["Aux", "NonFinite", "OnNonFinite", "Precision", "Step", "Task", "TrainState", "Window", "train_step"]
