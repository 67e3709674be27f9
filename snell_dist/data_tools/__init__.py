"""What is done with data before training: is it whole (check), record it (manifest), write it into shards (pack)."""
