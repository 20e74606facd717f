"""Reversible Flax models trained on real data.

python -m examples.flax_nnx --help
python -m examples.flax_linen --help
"""
