"""Scores as plain functions: numbers from texts, boxes and pictures."""
