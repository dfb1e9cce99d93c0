"""Miś-Minitron on MLX: make a language model smaller on the laptop it will run on."""

__version__ = "0.1.0"
