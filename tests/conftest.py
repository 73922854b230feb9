import torch
from hypothesis import settings

# Repeatable, and free of timing: a shared machine may stall any single example.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# The tensors are tiny: a second thread only waits, for long on a busy machine.
torch.set_num_threads(1)
