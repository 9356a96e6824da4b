"""Models as pure functions: families of encoders in Flax NNX, and Hugging Face folders in and out."""
