"""Gradients of single samples, read off the graph that autograd recorded."""
