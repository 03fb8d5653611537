"""What the project makes its own artefacts with; run from the repository, and not installed."""
