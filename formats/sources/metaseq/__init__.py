"""Checkpoints of metaseq, in which Meta hands out OPT and OPT-IML."""
