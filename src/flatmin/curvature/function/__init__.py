"""The function whose curvature is measured: a model, a criterion and data, evaluated batch by batch."""
