"""The models that can be chosen by name, and what each takes."""

from __future__ import annotations

from typing import NamedTuple

from recfx.checks import check_choice

__all__ = ["MODELS", "Model", "model_for"]


class Model(NamedTuple):
    """A model of `recfx.models`."""

    module: str
    config: str
    has_bias: bool  # whether it has a first-order term, the group "bias"
    has_fields: bool = True  # whether it has embeddings, the group "emb"
    several: bool = False  # whether it is for several tasks
    takes_width: bool = True  # whether its config has `dim`
    takes_number: bool = True  # whether its config has `num_sparse`


MODELS = {
    "lr": Model("lr", "LRConfig", True, has_fields=False, takes_width=False, takes_number=False),
    "fm": Model("fm", "FMConfig", True, takes_number=False),
    "fwfm": Model("fwfm", "FwFMConfig", True),
    "wide_deep": Model("wide_deep", "WideDeepConfig", True),
    "deepfm": Model("deepfm", "DeepFMConfig", True),
    "dcnv2": Model("dcnv2", "DCNv2Config", False),
    "dlrm": Model("dlrm", "DLRMConfig", False),
    "autoint": Model("autoint", "AutoIntConfig", False),
    "masknet": Model("masknet", "MaskNetConfig", False),
    "finalmlp": Model("finalmlp", "FinalMLPConfig", False),
    "finalnet": Model("finalnet", "FinalNetConfig", False),
    "shared_bottom": Model("shared_bottom", "SharedBottomConfig", False, several=True),
    "mmoe": Model("mmoe", "MMoEConfig", False, several=True),
    "ple": Model("ple", "PLEConfig", False, several=True),
}


def model_for(name: str, num_labels: int) -> Model:
    """The model of a name.

    Raises:   ValueError when there is none of that name, or it is for another number of labels.
    """
    check_choice("model", name, tuple(MODELS))
    model = MODELS[name]
    if model.several and num_labels == 1:
        raise ValueError(
            f"model: got '{name}' for one label, expected two or more labels. Choose another, or add a label."
        )
    if not model.several and num_labels > 1:
        fitting = ", ".join(f"'{other}'" for other, m in MODELS.items() if m.several)
        raise ValueError(
            f"model: got '{name}' for {num_labels} labels, expected one of {fitting}, which have a logit each."
        )
    return model
