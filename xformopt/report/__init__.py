"""Results as the contract's JSON, as a table in the terminal, and as one HTML file."""
