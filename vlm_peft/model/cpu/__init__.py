"""What is there only for CPUs."""
