"""What is there only for GPUs."""
