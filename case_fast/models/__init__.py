"""Models: they share layers, data, training and evaluation through the contract of `case_fast.models.base`.

`MODELS` is the one list of them: a new model is one file and one line here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from case_fast.errors import CheckpointError, ConfigError
from case_fast.models.base import DialogueModel, ModelConfig, Output, Reading, Why, read_config
from case_fast.models.case import CASE, CASEConfig, CASEOutput

# Name -> module and class of case_fast.models; a class is imported when it is asked for.
MODELS = {
    "case": "case.CASE",
    "transformer": "transformer.Transformer",
    "multi-trs": "transformer.MultiTRS",
    "cem": "cem.CEM",
    "mime": "mime.MIME",
    "kemp": "kemp.KEMP",
    "moel": "moel.MoEL",
    "empdg": "empdg.EmpDG",
    "empdg-d": "empdg_adversarial.AdversarialEmpDG",
}


def model_class(name: str) -> type[DialogueModel]:
    """The class of a model; `ConfigError` if there is none of this name."""
    if not isinstance(name, str) or name not in MODELS:
        raise ConfigError(f"there is no model {name!r}; one of {', '.join(MODELS)}")
    module, _, found = MODELS[name].rpartition(".")
    return getattr(importlib.import_module(f"case_fast.models.{module}"), found)


def title_of(name: str) -> str:
    """The name of a model for people."""
    return vars(model_class(name)).get("title") or model_class(name).__name__


def build(name: str, saved: bool = False, **settings: Any) -> DialogueModel:
    """A new model with these settings of its configuration; `ConfigError` names an unknown one. ``saved``: as of
    `ModelConfig.from_dict`."""
    kind = model_class(name)
    return kind(kind.Config.from_dict(settings, saved))


def load(folder: str | Path, map_location: str = "cpu") -> DialogueModel:
    """The model of any kind that `save_pretrained` wrote into ``folder``, in evaluation mode.

    Raises:
        CheckpointError: a part is missing or damaged, or the model is of a kind that this version does not know.
    """
    folder = Path(folder)
    name = read_config(folder).get("model", "case")
    if not isinstance(name, str) or name not in MODELS:
        known = ", ".join(MODELS)
        raise CheckpointError(f"{folder} holds the model {name!r}, which this version does not know; it knows {known}")
    return model_class(name).from_pretrained(folder, map_location)


__all__ = ["CASE", "MODELS", "CASEConfig", "CASEOutput", "DialogueModel", "ModelConfig", "Output", "Reading", "Why", "build",
           "load", "model_class", "title_of"]
