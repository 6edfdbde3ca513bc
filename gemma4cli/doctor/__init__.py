"""Looking at the machine: what is there, what a bundle or an export needs of it, and what to do about the difference.

Imports no torch, makes no CUDA context, changes nothing.
"""
