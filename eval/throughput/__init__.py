"""This project beside its peer; `python eval/throughput.py` runs it."""
