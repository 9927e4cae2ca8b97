"""How quick the library is: what is measured, against which peaks and peers. Driven by ``lopt bench``."""
