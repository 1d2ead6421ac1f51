"""What a step does to numbers that are in no table: the metrics' counts, a look for NaN and infinity."""
