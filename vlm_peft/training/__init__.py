"""Options, set-up and trainer of a run."""
