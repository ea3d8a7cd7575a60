"""Files, figures, devices and the command line."""
