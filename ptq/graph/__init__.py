"""Networks as `torch.fx` graphs: tracing, passes, plans and blocks."""
