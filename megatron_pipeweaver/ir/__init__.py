"""What flows through PipeWeaver: frozen data and its invariants; standard library only."""
