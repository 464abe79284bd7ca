"""Training looped models from scratch: the text, the trainer, the bundled family."""
