"""Measure the fast engine on a GPU: its results, its speed, its memory, and where its time goes."""
