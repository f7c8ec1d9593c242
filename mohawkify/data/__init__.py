"""Text in, packed token batches out; the order is a pure function of seed and step."""
