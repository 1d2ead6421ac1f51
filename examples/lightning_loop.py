"""The captured step inside a Lightning trainer, with its logging, progress bar and early stopping.

pip install lightning; python examples/lightning_loop.py
"""

import tempfile

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping

from recfx import checkpoint
from recfx.capture import capture, capture_evaluation
from recfx.data import fixedlen, from_arrays, varlen
from recfx.embeddings import Embedding
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step
from recfx.train import evaluate

COLUMNS = [fixedlen("label", [0.0]), varlen("user", torch.int64), varlen("item", torch.int64)]


def clicks(number, seed):
    """A user clicks on items of the same parity."""
    user, item = torch.randint(0, 100, (2, number), generator=torch.Generator().manual_seed(seed))
    return {"label": (user % 2 == item % 2).float().numpy(), "user": user.numpy(), "item": item.numpy()}


class Clicks(lightning.LightningModule):
    """recfx holds the parameters, the rows and the optimisers; Lightning drives the loop."""

    def __init__(self, first, held_out, folder):
        super().__init__()
        self.automatic_optimization = False  # a step computes its gradients and moves by itself
        self.held_out, self.folder = held_out, folder
        self.recfx_step = train_step(
            features=dict,
            embeddings={"emb": [Embedding("user", dim=8), Embedding("item", dim=8)]},
            forward=lambda params, emb, feats: emb["emb"].prod(1).sum(1, keepdim=True) + params["bias"],
            sparse_optimizer=sparse_adamw(lr=3e-2),
            dense_optimizer=adamw(lr=3e-2),
        )
        self.state = self.recfx_step.init({"bias": torch.zeros(1)})
        self.run = capture(self.recfx_step, self.state, first, backend="eager")
        self.run_held_out = capture_evaluation(self.recfx_step, self.state, first, backend="eager")

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # the captured step copies it where its tables are

    def training_step(self, batch, batch_idx):
        self.state, aux = self.run(self.state, batch)
        self.log("loss", aux.loss.clone(), prog_bar=True, batch_size=len(batch["label"]))

    def on_train_epoch_end(self):
        values = evaluate(self.run_held_out, self.state, self.held_out)
        self.log("auc", values["auc"], prog_bar=True)
        number = int(self.state.step)
        checkpoint.save(self.folder, self.recfx_step, self.state, number=number, loop={"auc": values["auc"]})

    def configure_optimizers(self):
        return None


def main():
    """Trains until the AUC stops rising; prints where it stands."""
    train = from_arrays(clicks(20_000, 0), COLUMNS, 500, drop_remainder=True)
    held_out = from_arrays(clicks(2_000, 1), COLUMNS, 500)
    with tempfile.TemporaryDirectory() as folder:
        model = Clicks(train.first(), held_out, folder)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        stop = EarlyStopping("auc", mode="max", patience=2, min_delta=1e-3, check_on_train_epoch_end=True)
        trainer = lightning.Trainer(
            max_epochs=10, accelerator="cpu", callbacks=[stop], enable_model_summary=False, **quiet
        )
        trainer.fit(model, train)
        auc = float(trainer.callback_metrics["auc"])
        print(f"{int(model.state.step)} steps, AUC {auc:.3f}, newest checkpoint {checkpoint.latest(folder).name}")


if __name__ == "__main__":
    main()
