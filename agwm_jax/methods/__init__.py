"""Fine-tuning methods, one a file; each registers its settings, which build it."""
