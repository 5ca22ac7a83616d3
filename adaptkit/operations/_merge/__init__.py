"""Parts of ``merge`` and ``unmerge``: which adapter changes which tensor, applied and undone piece by piece."""
