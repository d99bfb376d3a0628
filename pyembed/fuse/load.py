"""A model by name, for the command line."""

import importlib
import os
import sys
from typing import Any

from torch import nn

TINY = {  # what a configuration has of these becomes small
    "num_hidden_layers": 1, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 512,
    "num_experts": 4, "num_local_experts": 4,
}  # fmt: skip


def load_model(name: str) -> nn.Module:
    """name: "module:function", which is called without arguments and returns a model; or a configuration class of transformers
    such as "LlamaConfig", of which a tiny model with random weights is made.

    ImportError, AttributeError: there is no such thing. TypeError: it returned no model. ValueError: another name."""
    module, _, function = name.partition(":")
    if function:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        model = getattr(importlib.import_module(module), function)()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected {name} to return an nn.Module, got a {type(model).__name__}")
        return model
    if not name.endswith("Config"):
        raise ValueError(f"expected module:function or the name of a configuration class of transformers, got {name!r}")
    import transformers

    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise AttributeError(f"transformers has no {name}")
    names: dict[str, str] = getattr(kind, "attribute_map", {})
    usual = kind()
    config = kind(**{key: value for key, value in TINY.items() if hasattr(usual, names.get(key, key))})
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    raise ValueError(f"transformers has no model that {name} is of")
