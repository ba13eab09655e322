"""Plug-ins: how weights are rounded. A file without a leading underscore is selectable by its name."""
