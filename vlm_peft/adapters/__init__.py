"""What trains, and the way between an adapter folder and a model."""
