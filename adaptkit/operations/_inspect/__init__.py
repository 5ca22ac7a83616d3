"""What ``inspect`` tells of kinds of folders."""
