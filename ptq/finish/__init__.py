"""Plug-ins: what the whole network is tuned by, after its blocks. A file without a leading underscore is selectable by its name."""
