"""Programs that read what adaptkit writes: one file a program, ``TARGET`` in it says what that program takes."""
