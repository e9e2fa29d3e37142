"""The `vfio` command: one file a group of commands."""
