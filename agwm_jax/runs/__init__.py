"""One run or many from settings to files: build, train or resume, evaluate, predict, export."""
