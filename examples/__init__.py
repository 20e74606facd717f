"""Reversible models trained on real data, in PyTorch and in Flax, made to be copied from.

python -m examples
"""
