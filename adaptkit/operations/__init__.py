"""One operation per module: options, function, report. Each plans, validates, streams, writes a manifest, renames."""
