"""Many runs of a recipe, one resumable table: strategies side by side, and hyper-parameters searched."""
