"""`python -m cupyattn.compat.table`: print the table."""

from . import render

print(render(), end="")
