"""Executes the PTX that Triton compiles, on a CPU. ``docs/design/ptx.md`` says what it proves and what it cannot."""
