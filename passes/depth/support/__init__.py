"""What the passes on depth share: where layers begin and end, what branches are made of, what a layer is worth."""
