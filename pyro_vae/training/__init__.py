"""Training: one function, `fit`, and what it leaves in a run folder."""

from pyro_vae.processes import is_first_process
from pyro_vae.training.fitting import fit
from pyro_vae.training.progress import History, State
from pyro_vae.training.run_folder import load_weights, put_weights, read_run

__all__ = [
    "History",
    "State",
    "fit",
    "is_first_process",
    "load_weights",
    "put_weights",
    "read_run",
]
