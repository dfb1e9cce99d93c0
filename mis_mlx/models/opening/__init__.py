"""From a name to an open model: find it, judge its files, read its config, load it.

Files of strangers are read here with suspicion. Only headers and configs are read until somebody
asks for weights. Nothing here writes into a model's folder.
"""
