"""`porter bench runtime`: milliseconds of a step, memory and compile time, beside diffusers, in one run."""
