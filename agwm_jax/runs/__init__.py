"""One run or many from settings to files: build, train or resume, evaluate, predict, export."""

from agwm_jax.runs.finished import evaluate as evaluate
from agwm_jax.runs.finished import export as export
from agwm_jax.runs.finished import predict as predict
from agwm_jax.runs.fitting import fit as fit
from agwm_jax.runs.run import train as train
