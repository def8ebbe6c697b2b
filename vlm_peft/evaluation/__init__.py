"""Generation, the scores of what was generated, and their files."""
