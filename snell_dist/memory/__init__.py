"""The instrument: where the bytes of a training step are."""
