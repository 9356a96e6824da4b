"""Running a configuration: the training loop, checkpoints, run folders, evaluation."""
