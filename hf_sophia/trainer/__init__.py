"""The integration with transformers and accelerate; nothing below it knows of either."""
