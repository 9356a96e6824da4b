"""Tasks, tokenised arrays and batching plans; import the submodules, so that `plan` stays free of `datasets`."""
