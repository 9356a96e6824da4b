"""From one labelled file to a model that can be trusted: what is in the file, which method, how sure, the model."""
