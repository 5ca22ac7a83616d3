"""Programs that read what adaptkit writes: one module per program, whose ``TARGET`` holds its tables of answers."""
