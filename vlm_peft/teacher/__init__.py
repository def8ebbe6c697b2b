"""The teacher: pictures in, texts of a larger model out, filtered, with their provenance."""
