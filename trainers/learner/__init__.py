"""The learner: optimiser steps from packed trees, and checkpoints."""
