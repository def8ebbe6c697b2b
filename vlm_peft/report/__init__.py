"""Pages and cards from what a run wrote."""
