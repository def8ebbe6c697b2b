"""Data: rows by name, their pictures, and what a run reads: one data set, a mixture or a stream, and its guard."""
