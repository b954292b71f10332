"""Prints the folder of SmolLM2-135M, or of a model of its first two layers made there, and the dtype to compute in."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from treegym.agents.inference.forward import native_dtype
from treegym.agents.models.registry import fetch, load

if len(sys.argv) > 1:
    model: Any
    model, tokenizer = load("smollm2")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])
folder = sys.argv[1] if len(sys.argv) > 1 else str(fetch("smollm2"))
dtype = str(native_dtype(torch.device("cpu"))).removeprefix("torch.")
print(json.dumps({"model": folder, "dtype": dtype}))
