"""Where to look for settings, and choosing them on validation data."""
