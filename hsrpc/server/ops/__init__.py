"""What operators look at: metrics, log, spans, and the exit that nothing can hold up."""
