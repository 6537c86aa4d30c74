"""Captions drawn again with other seeds, where it pays: best-of-n and redraw."""
