"""How much the loss rises around the weights: at random, at worst, and along directions."""
