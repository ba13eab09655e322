"""Training a student, quantized or of another architecture, to give what its teacher gives."""
