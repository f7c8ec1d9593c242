"""The training loop and the engine it runs on."""
