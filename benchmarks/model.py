"""Prints the folder of SmolLM2-135M, or makes a model of its first two layers in the folder given."""

from __future__ import annotations

import sys
from typing import Any

from treegym.agents.models import fetch, load

if len(sys.argv) > 1:
    model: Any
    model, tokenizer = load("smollm2")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])
print(sys.argv[1] if len(sys.argv) > 1 else fetch("smollm2"))
