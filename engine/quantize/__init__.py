"""What the number formats are: int8 weights with a scale an output channel, int8 rows with a scale each."""
