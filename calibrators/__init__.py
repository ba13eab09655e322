"""Plug-ins: where calibration images come from. A file without a leading underscore is selectable by its name."""
