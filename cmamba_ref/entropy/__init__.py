"""Entropy models (factorised prior, Gaussian conditional), integer tables and the rANS coder."""
