"""The part of a bundle that runs on the device; needs Python, numpy and the target's runtime."""
