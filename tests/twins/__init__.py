"""Naive NumPy twins of the ops, written from the definitions alone: slow, and obviously right."""
