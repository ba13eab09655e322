"""Plug-ins: where quantized models go. A file without a leading underscore is selectable by its name."""
