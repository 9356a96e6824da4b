"""Makes reference.py and the small models importable, and asks for torch: nothing here is skipped without it."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models")]
torch.set_num_threads(2)
