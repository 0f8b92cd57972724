"The driver: the command line, the clock of a run, and what people see of it."
