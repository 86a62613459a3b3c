"""The trace of the Hessian: exactly where possible, else estimated, with its error."""
