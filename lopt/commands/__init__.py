"""The commands of the program ``lopt``, one module each: a frozen dataclass whose fields are the options."""
