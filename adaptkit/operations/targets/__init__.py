"""Programs that read what adaptkit writes: one module per program, whose ``TARGET`` checks what it accepts."""
