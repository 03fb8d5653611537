"""What a number format costs in quality, measured through the same decoder, cache and chunks that serve."""
