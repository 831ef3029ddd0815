"""Attention whose cost grows with the length instead of its square, in place of softmax attention."""
