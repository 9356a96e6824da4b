"""How the phases of any method run on any model over any mesh: compile, lanes, chunks, save, resume."""
