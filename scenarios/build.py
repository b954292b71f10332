"""From a scenario to the objects that train: model, renderer, policy."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..agents import Chains, ChatRenderer, Evaluation, TransformersPolicy, derive_seed, grow_trees
from ..agents.models import load
from ..trainers import Watcher
from .schema import Scenario
