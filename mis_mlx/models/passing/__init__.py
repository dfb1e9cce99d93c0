"""Hidden states through a model: whole or block by block, forward and back, on one machine or more.

What stays in memory between passes is decided here. Weights are read, never written.
"""
