"""What ``merge`` and ``unmerge`` do: which adapter changes which tensor, applied and taken back piece by piece."""
