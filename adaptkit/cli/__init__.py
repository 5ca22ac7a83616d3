"""The command line: arguments in, one document or table out. Heavy imports happen inside the commands."""
