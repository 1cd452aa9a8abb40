"""Super-resolution of clinical T1w brain MRI with a mixture of seven experts (REMIx)."""

__version__ = "0.1.0"
