"""The timing protocol, its statistics, the machine it ran on, memory, parity and per-operator profiles."""
