"""Every error a user can meet.

    PtqError
    ├── SpecError             a bit width, grid or option that does not exist
    ├── PluginError           an unknown calibrator, reconstructor or exporter, or a bad option of one
    ├── ModelError            a network or a file of one that cannot be read, traced or quantized
    ├── CalibrationError      calibration images that cannot be made, read or used
    ├── ReconstructionError   block reconstruction that cannot run
    ├── ExportError           a network that the target cannot hold, or a file that does not compute what was simulated
    └── ArtifactError         an output folder that cannot be written or read

A message says what was asked, what was found and what to do, on one line.
"""


class PtqError(Exception):
    """Base of all errors of this package."""


class SpecError(PtqError):
    """A bit width, integer grid or option that does not exist."""


class PluginError(PtqError):
    """An unknown plug-in, or an option it does not have."""


class ModelError(PtqError):
    """A network, or a file of one, that cannot be read, traced or quantized."""


class CalibrationError(PtqError):
    """Calibration images that cannot be made, read or used."""


class ReconstructionError(PtqError):
    """Block reconstruction that cannot run."""


class ExportError(PtqError):
    """A network that the target cannot hold, or an exported file that disagrees with the simulation."""


class ArtifactError(PtqError):
    """An output folder that cannot be written or read."""
