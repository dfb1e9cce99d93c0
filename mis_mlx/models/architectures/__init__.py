"""What a model is, by its config: tensors, how a block runs, what it carries, which axes it has.

Everything that differs between families lives here, and nothing here reads a file of weights,
moves blocks through memory or writes. This room imports none of the other three.
"""
