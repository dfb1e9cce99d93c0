"""Models: what they are (architectures), how they are opened, passed through and written."""
