"""What goes beside any method: averages of the weights, distance to the initialisation, mixup."""
