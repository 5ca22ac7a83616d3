"""Pages: templates, and one module per command that prepares what they show."""
