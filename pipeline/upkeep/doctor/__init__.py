"""`pipeline doctor`: whether this machine and file system are fit, each finding with its fix."""
