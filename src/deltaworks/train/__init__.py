"""A recipe to a run: data, base models, tasks, losses and the clock of procedures."""
