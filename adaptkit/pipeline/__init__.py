"""Make releases from a recipe: sources, steps, a lock file, and a work folder that caches the steps' outputs."""
