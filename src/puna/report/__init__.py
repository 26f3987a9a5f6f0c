"""The report of a run: the paper's tables and figures, from the run's own files."""
