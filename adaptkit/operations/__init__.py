"""One operation a module: options, function and report. All go plan, validate, stream, manifest, rename."""
