"""Autograd that keeps little: one saved input for all that read it, and what can be made again is made again."""
